"""The web program's parts: from a client's upload to the queue, and every other address. Imports no Keras."""
