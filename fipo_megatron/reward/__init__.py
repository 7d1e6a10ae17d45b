"""Whether a response is right: verifiers by name, run where a bad answer can do no harm."""
