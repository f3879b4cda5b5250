"""Text that the teacher or the student writes, to be learned from."""
