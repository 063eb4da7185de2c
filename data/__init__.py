"""The dataset registry. Add your datasets here, then train with ``--dataset_use "my_dataset%50,other"``.

An entry names the annotations and the folder of their media:

    MY_DATASET = {
        "annotation_path": "/data/my_dataset/annotations.jsonl",  # .json, .jsonl, .parquet; .json.gz, .jsonl.gz
        "data_path": "/data/my_dataset/images",  # "" where the annotations hold absolute paths, or have no media
    }
    data_dict = {..., "my_dataset": MY_DATASET}

``annotation_path`` may be a pattern, ``"train/*.jsonl"``, or a list, ``["a.json", "b/**/*.parquet"]``. Instead of it,
``hf_dataset`` names what the ``datasets`` library opens, a folder or a name on the Hugging Face hub, and ``columns``
which fields have another name in the rows, of files as well:

    {"hf_dataset": "/data/saved"}  # save_to_disk, Parquet with pictures inside, ...; then data_path may be left out
    {"hf_dataset": "owner/name", "split": "train", "config": "en", "columns": {"image": "picture"}}

Boxes in its texts count as the model family writes them. Where they count pixels of the original pictures, add
``"bbox_format": "pixel"``, and they are converted for the family in use (qwenvl/data/conversation/boxes/convert.py).

Relative paths start from the folder that holds this package (the top of the repository), from wherever you train.
"""

import os

# What tools/make_demo_data.py draws; scripts/demo.sh makes it, in DEMO_DIR where that is set.
_DEMO_TASKS = ("digits", "comparisons", "grounding", "motion")
_DEMO_DIR = os.environ.get("DEMO_DIR", "demo")

data_dict = {
    # "my_dataset": {
    #     "annotation_path": "/data/my_dataset/annotations.jsonl",
    #     "data_path": "/data/my_dataset/images",
    # },
    **{
        f"demo_{task}{suffix}": {
            "annotation_path": f"{_DEMO_DIR}/data/{task}_{split}.jsonl",
            "data_path": f"{_DEMO_DIR}/data",
        }
        for task in _DEMO_TASKS
        for split, suffix in (("train", ""), ("heldout", "_heldout"))
    },
    **{  # of tools/make_mask_data.py, for scripts/demo_masks.sh
        f"demo_masks{suffix}": {
            "annotation_path": f"{_DEMO_DIR}/mask_scenes/scenes_{split}.jsonl",
            "data_path": f"{_DEMO_DIR}/mask_scenes",
        }
        for split, suffix in (("train", ""), ("heldout", "_heldout"))
    },
}
