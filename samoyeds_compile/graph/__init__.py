"""Reading and editing FX graphs: canonical op names, a functional view of values, splicing."""
