"""The command line: `headscope see`, `heads`, `forbid`, `train`, `experiment`, and what keeps models."""
