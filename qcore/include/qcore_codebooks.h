/* Made by `python -m qcore.codebooks`: do not edit. */
#ifndef QCORE_CODEBOOKS_H
#define QCORE_CODEBOOKS_H
static const float QC_NF4_TABLE[16] = {
    -0x1.0000000000000p+0f,
    -0x1.6473620000000p-1f,
    -0x1.0cd6600000000p-1f,
    -0x1.9465400000000p-2f,
    -0x1.23449a0000000p-2f,
    -0x1.7a6a7e0000000p-3f,
    -0x1.74f0e20000000p-4f,
    0x0.0p+0f,
    0x1.45f5fe0000000p-4f,
    0x1.4995c60000000p-3f,
    0x1.f809ba0000000p-3f,
    0x1.5a06740000000p-2f,
    0x1.c349700000000p-2f,
    0x1.200f560000000p-1f,
    0x1.7227660000000p-1f,
    0x1.0000000000000p+0f};
static const float QC_FP4_TABLE[16] = {
    0x0.0p+0f,
    0x1.5555560000000p-8f,
    0x1.5555560000000p-1f,
    0x1.0000000000000p+0f,
    0x1.5555560000000p-2f,
    0x1.0000000000000p-1f,
    0x1.5555560000000p-3f,
    0x1.0000000000000p-2f,
    0x0.0p+0f,
    -0x1.5555560000000p-8f,
    -0x1.5555560000000p-1f,
    -0x1.0000000000000p+0f,
    -0x1.5555560000000p-2f,
    -0x1.0000000000000p-1f,
    -0x1.5555560000000p-3f,
    -0x1.0000000000000p-2f};
static const float QC_FP4_THRESHOLDS[7] = {
    0x1.5555720000000p-9f,
    0x1.6000000000000p-4f,
    0x1.aaaaaa0000000p-3f,
    0x1.2aaaaa0000000p-2f,
    0x1.aaaaac0000000p-2f,
    0x1.2aaaa00000000p-1f,
    0x1.aaaaaa0000000p-1f};
static const unsigned char QC_FP4_ORDER[8] = {0, 1, 6, 7, 4, 5, 2, 3};
#endif
