"""The dataset registry. Add your datasets here, then train with ``--dataset_use "my_dataset%50,other"``.

An entry names the annotations and the folder of their media.

``annotation_path`` is a .json, .jsonl, .json.gz, .jsonl.gz or .parquet file, a pattern, ``"train/*.jsonl"``, or a list,
``["a.json", "b/**/*.parquet"]``. Instead of it, ``hf_dataset`` names what the ``datasets`` library opens. ``columns``
says which fields have another name in the rows, of files as well.

Boxes in its texts count as the model family writes them. Where they count pixels of the original images, add
``"bbox_format": "pixel"``, and they are converted for the family in use.

Relative paths start from the folder that holds data/, from wherever you train.
"""

from qwenvl.cli.make_demo_data.datasets import demo_datasets

data_dict = {
    # "my_dataset": {
    #     "annotation_path": "/data/my_dataset/annotations.jsonl",
    #     "data_path": "/data/my_dataset/images",  # "" where paths are absolute, or there are no media
    # },
    # "my_hf_dataset": {
    #     "hf_dataset": "owner/name",  # or a folder: save_to_disk, Parquet with images inside, ...
    #     "split": "train",
    #     "columns": {"image": "picture"},  # the field image is called picture there
    # },
}
data_dict |= demo_datasets()
