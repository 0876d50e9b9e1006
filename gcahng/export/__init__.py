"""The metric model for other runtimes, checked against the model it came from."""
