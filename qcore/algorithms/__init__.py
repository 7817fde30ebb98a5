"""How to choose the codes: round to nearest, GPTQ and AWQ, and the pass over calibration data that both need."""
