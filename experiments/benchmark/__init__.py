"""Speed and memory of this project: training beside peft (`__main__`), and memory over growing batches (`memory`)."""
