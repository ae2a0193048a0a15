"""The layers of the benchmark of weight normalization, and their forms in each framework.

One module for each framework, loaded in a process of its own: ``forms`` gives the forms of one layer in one
of ``MODES``, and ``PACKAGES`` says what is measured.
"""
