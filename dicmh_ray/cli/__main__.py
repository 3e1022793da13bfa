"""``python -m dicmh_ray.cli`` is the ``dicmh`` program."""

from dicmh_ray.cli import main

main()
