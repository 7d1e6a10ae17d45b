"""A page and a picture of one or several runs: curves, a comparison and a token view (``fipo report RUN [RUN …]``)."""
