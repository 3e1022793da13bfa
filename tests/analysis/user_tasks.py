"""Tasks as a user writes them."""

import pyarrow as pa

from dicmh_ray.analysis import Task


class Brightness(Task):
    """Mean of the samples."""

    name = "brightness"
    reads = "machine"
    schema = pa.schema([("mean", pa.float32())])

    def __call__(self, batch):
        return batch.table(mean=[picture.mean() for picture in batch.values])


class Fussy(Brightness):
    """Fails on one picture."""

    name = "fussy"

    def __call__(self, batch):
        if any(key.endswith("-1") for key in batch.keys):
            raise RuntimeError("not this one")
        return super().__call__(batch)


class Broken(Brightness):
    """Fails on all."""

    name = "broken"

    def __call__(self, batch):
        raise RuntimeError("no")


class Wrong(Brightness):
    """Gives other columns than it says."""

    name = "wrong"

    def __call__(self, batch):
        return pa.table({"key": batch.keys})


NOT_A_TASK = 7
