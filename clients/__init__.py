"""Local sides: what a client does with its own data. Each imports fedsim alone, as a user's would."""
