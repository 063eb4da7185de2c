"""What tools/predict.py and tools/evaluate.py share: flags, opening, chat."""
