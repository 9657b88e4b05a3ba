"""What is known of the triton backend without a GPU (`compiled`), and what one run on a GPU adds (`run`, `steps`)."""
