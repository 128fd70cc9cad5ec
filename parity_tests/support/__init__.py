"""What the tests share: the bars, the reference, small environments."""
