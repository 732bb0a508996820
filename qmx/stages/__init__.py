"""The stages, each a function of a `Run` that leaves an artefact in the workdir."""
