"""The Headwater service: datasets and models in, attributions out, over HTTP."""
