"""The dataset registry. Add your datasets here, then train with ``--dataset_use "my_dataset%50,other"``.

An entry names the annotations and the folder of their media:

    MY_DATASET = {
        "annotation_path": "/data/my_dataset/annotations.jsonl",  # or a list of files; .json, .jsonl, .parquet, .gz
        "data_path": "/data/my_dataset/images",  # "" where the annotations hold absolute paths, or have no media
    }
    data_dict = {..., "my_dataset": MY_DATASET}

Boxes in its texts count as the model family writes them. Where they count pixels of the original pictures, add
``"bbox_format": "pixel"``, and they are converted for the family in use (qwenvl/data/boxes.py).

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
}
