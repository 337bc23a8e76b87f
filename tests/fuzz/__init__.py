"""The XDP program against the reference in plain Python, on millions of frames: `make fuzz`.

tests/test_oracle.py asks the same with hypothesis, which shrinks what it finds, on some thousand frames.
"""
