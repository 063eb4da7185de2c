"""Rules of single settings: limits, engines, metrics, and the fields of transformers.TrainingArguments."""
