"""Parts of tools/predict.py: answers to datasets and questions, and the chat."""
