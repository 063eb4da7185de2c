"""The dataset registry, annotation files and Hugging Face datasets: rows to samples, nothing decoded."""
