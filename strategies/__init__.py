"""Server sides: what the server does with what its clients answer. Each imports fedsim alone, as a user's would."""
