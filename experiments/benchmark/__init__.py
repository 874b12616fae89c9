"""Speed and memory of this project: training beside peft (`__main__`), image loading, retrieval, large batches."""
