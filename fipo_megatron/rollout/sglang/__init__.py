"""SGLang servers: their processes, the client, and the handshake with them."""
