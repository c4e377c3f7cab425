"""What a selection log tells: the numbers of ``siftloader inspect-selections``."""
