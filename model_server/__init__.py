"""The model program: the model, and the loop that takes batches and answers them. Imports no Flask."""
