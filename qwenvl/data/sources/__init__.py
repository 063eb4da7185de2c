"""The dataset registry, annotation files and Hugging Face datasets: rows to samples, without decoding media."""
