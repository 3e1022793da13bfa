"""Archives where people read: Arrow, fsspec, PyTorch, WebDataset, Hugging Face datasets.

    arrow              latents as an Arrow extension type; the parts for DuckDB, Polars, pandas
    files              an fsspec file system, ``dicmh://``: archived images as if they were files
    torch_data         ArchiveIterable and ArchiveDataset
    webdataset_stream  samples as the webdataset library gives them
    huggingface        load_hf

Each module needs its own library and nothing of the others; Ray Data is in
:mod:`dicmh_ray.ray_plugin`. All of them decode by :mod:`dicmh_ray.views`, in the process that asks.
"""
