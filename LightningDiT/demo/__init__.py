"""A page on which a person samples models, and a gallery of every class. `page` and `serving` alone import gradio."""
