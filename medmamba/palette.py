"""Colours of structures, the same in every picture."""

#: Okabe and Ito's colours, which people with colour blindness tell apart.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
