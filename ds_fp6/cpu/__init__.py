"""What DeepSpeed-FastGen needs in order to run on a CPU: an accelerator and the operators of its ragged batches."""
