"""What breaks a store or a job on purpose: for the tests, and for ``jobs/chaos.py`` on a cluster.

* :mod:`~dicmh_ray.testing.fake_codec`: an image codec without torch.
* :mod:`~dicmh_ray.testing.fault_proxy`: an S3 endpoint that fails by a seeded schedule.
* :mod:`~dicmh_ray.testing.ceph`: a real S3 server, started for the occasion.
* :mod:`~dicmh_ray.testing.failpoints`: a call at every operation of a store, by name.

Nothing else in the package imports it.
"""
