// X W for bfloat16 on AMX tiles. Only kernel files include it.
//
// A tile of X is sixteen of its rows by 64 bytes, as they lie in memory; a tile of W sixteen pairs of its rows by
// sixteen columns (gemm_4bit_pairs.h, int8_pairs.h). Regular rows and panels only, as in gemm_4bit_amx.h.
//
// Memory picture: a panel, 64 columns of 288 rows of W or fewer, is decoded into 36 KiB of scratch (L2), a pair of its
// tile columns at a time is held in L1 and meets every tile of X of that span, two tiles of sums in registers
// (tile_unit.h). Meanwhile, a few pairs of rows between two tile products, the next panel is decoded into other 36 KiB:
// the tile unit keeps its pace, and decoding is free from about 64 rows of X on. The sums of a slice of columns wait in
// scratch between spans (L2), so that X is read once for a slice, and a line of W is used up while it is in L2.
#ifndef QCORE_CPU_TRANSPOSED_AMX_H
#define QCORE_CPU_TRANSPOSED_AMX_H

#include "tile_unit.h"
#include "transposed_weight.h"

#if defined(__AMX_BF16__)

namespace qcore::cpu::QC_ISA {

constexpr int64_t kPairTile = 32;             // rows of W of a tile
constexpr int64_t kPairSumBytes = 512 << 10;  // of a slice, about

inline int64_t transposed_groups(int64_t rows) { return (rows + kTile - 1) / kTile; }

// Rows of a tile of X and of sums: sixteen, unless X has fewer.
inline int64_t transposed_tile_rows(int64_t rows) { return rows < kTile ? rows : kTile; }

inline int64_t transposed_slice(int64_t rows, int64_t columns) {
    const int64_t most = kPairSumBytes / (transposed_groups(rows) * kTileBytes) * kTile / kPairColumns * kPairColumns;
    const int64_t limit = most < kMostPanels * kPairColumns ? most : kMostPanels * kPairColumns;
    const int64_t wanted = (columns + kPairColumns - 1) / kPairColumns * kPairColumns;
    return wanted < limit ? wanted : limit;
}

inline int64_t transposed_tile_bytes(int64_t rows, int64_t k) {
    return (k + kPairTile - 1) / kPairTile * transposed_groups(rows) * transposed_tile_rows(rows) * kTileRowBytes;
}

// Rows of W at a time.
template <class Weight>
inline int64_t transposed_span(int64_t rows, int64_t columns, int64_t k) {
    return even_span(k, PairDecoder<Weight>::span(rows, columns), kPairTile);
}

inline int64_t transposed_panel_bytes(int64_t span) { return span * kPairColumns * 2; }

template <class Weight>
inline int64_t transposed_scale_bytes(int64_t span) {
    return span * PairDecoder<Weight>::kScales * static_cast<int64_t>(sizeof(float));
}

template <class Weight>
inline int64_t transposed_scratch_bytes(const TransposedProduct<Weight> &p, int64_t rows, int64_t columns) {
    const int64_t span = transposed_span<Weight>(rows, p.n, p.k);
    return 2 * transposed_panel_bytes(span) + transposed_scale_bytes<Weight>(span) +
           transposed_slice(rows, columns) / kTile * transposed_groups(rows) * kTileBytes;
}

// Tiles of X lie by span, which begins at k0, then by group of sixteen rows, then along k. `count`: tiles along k in
// it.
inline int64_t transposed_x_tile(int64_t k0, int64_t groups, int64_t tile_rows, int64_t group, int64_t count) {
    return (k0 / kPairTile * groups + group * count) * tile_rows * kTileRowBytes;
}

// Tiles along k in the span that begins at k0.
inline int64_t transposed_span_tiles(int64_t k, int64_t k0, int64_t span) {
    const int64_t left = k - k0 < span ? k - k0 : span;
    return (left + kPairTile - 1) / kPairTile;
}

// Packs group `group` of the `rows` rows from `x` on, k elements each.
template <class Weight>
inline void pack_transposed_x(const TransposedProduct<Weight> &p, const Bfloat *x, int64_t rows, int64_t group,
                              uint8_t *tiles) {
    const int64_t k = p.k;
    const int64_t groups = transposed_groups(rows);
    const int64_t height = transposed_tile_rows(rows);
    const int64_t span = transposed_span<Weight>(rows, p.n, k);
    for (int64_t k0 = 0; k0 < k; k0 += span) {
        const int64_t count = transposed_span_tiles(k, k0, span);
        uint8_t *out = tiles + transposed_x_tile(k0, groups, height, group, count);
        for (int64_t i = 0; i < height; ++i) {
            const int64_t row = group * kTile + i;
            for (int64_t t = 0; t < count; ++t) {
                const int64_t first = k0 + t * kPairTile;
                const int64_t left = row >= rows ? 0 : k - first;
                const auto valid = static_cast<__mmask32>(left >= kPairTile ? 0xffffffffu : (1u << left) - 1);
                const __m512i v = TransposedWeight<Weight>::x_pairs(p.w, x + row * k + first, first, valid);
                _mm512_storeu_si512(out + (t * height + i) * kTileRowBytes, v);
            }
        }
    }
}

// sums += tiles of X * tiles of W over `count` tiles along k, for two columns of tiles. meanwhile() is called once a
// step.
template <class Meanwhile>
inline void multiply_pair_tiles(const uint8_t *x, int64_t x_tile_bytes, const uint8_t *w, int64_t w_stride,
                                int64_t count, bool first, uint8_t *left, uint8_t *right, const Meanwhile &meanwhile) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, left, 64);
        _tile_loadd(1, right, 64);
    }
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t line = 0; line < kTileBytes; line += 64) {
            _mm_prefetch(x + (t + 1) * x_tile_bytes + line, _MM_HINT_T0);
        }
        _tile_loadd(2, x + t * x_tile_bytes, 64);
        _tile_loadd(3, w + t * kTileBytes, 64);
        Bf16Tiles::add<0>();
        _tile_loadd(3, w + w_stride + t * kTileBytes, 64);
        Bf16Tiles::add<1>();
        meanwhile();
    }
    _tile_stored(0, left, 64);
    _tile_stored(1, right, 64);
}

// Columns n0 ... n1 - 1 of `rows` rows; odd_panel(first, end) is called for columns that are not regular.
template <class Weight>
class TransposedTiles {
   public:
    TransposedTiles(const TransposedProduct<Weight> &p, int64_t row0, int64_t rows, int64_t n0, int64_t n1,
                    const uint8_t *x, void *scratch)
        : p_(p),
          row0_(row0),
          rows_(rows),
          n0_(n0),
          n1_(n1),
          span_(transposed_span<Weight>(rows, p.n, p.k)),
          groups_(transposed_groups(rows)),
          height_(transposed_tile_rows(rows)),
          x_(x),
          panels_(static_cast<uint8_t *>(scratch)),
          scales_(reinterpret_cast<float *>(panels_ + 2 * transposed_panel_bytes(span_))),
          sums_(reinterpret_cast<uint8_t *>(scales_) + transposed_scale_bytes<Weight>(span_)),
          decoder_(p) {}

    template <class OddPanel>
    void run(const OddPanel &odd_panel) {
        TileConfig config;
        for (int tile = 0; tile < 3; ++tile) {  // sums and X
            config.rows[tile] = static_cast<uint8_t>(height_);
        }
        load_tile_config(config);
        const int64_t slice = transposed_slice(rows_, n1_ - n0_);
        for (first_ = n0_; first_ < n1_; first_ += slice) {
            end_ = first_ + slice < n1_ ? first_ + slice : n1_;
            multiply_slice();
            for (int64_t n = first_; n < end_; n += kPairColumns) {
                if ((odd_ >> ((n - first_) / kPairColumns) & 1) == 0) {
                    finish(n);
                }
            }
            for (int64_t n = first_; odd_ != 0; n += kPairColumns, odd_ >>= 1) {
                if ((odd_ & 1) != 0) {
                    odd_panel(n, n + kPairColumns < end_ ? n + kPairColumns : end_);
                }
            }
        }
        _tile_release();
    }

   private:
    // The panel that is being decoded.
    struct Target {
        int64_t k0, n;
        int64_t row, end;  // the next pair of rows, and where the last tile ends
        int64_t ahead;     // bytes that a row of W is fetched ahead
        uint8_t *out;
    };

    // Of a column of tiles of a panel.
    int64_t column_bytes() const { return span_ / kPairTile * kTileBytes; }

    void begin(int64_t item, int64_t panels) {
        const int64_t panel = item % panels;
        target_.k0 = item / panels * span_;
        target_.n = first_ + panel * kPairColumns;
        target_.row = 0;
        target_.end = transposed_span_tiles(p_.k, target_.k0, span_) * kPairTile;
        target_.out = panels_ + (item & 1) * transposed_panel_bytes(span_);
        const int64_t rows = p_.k - target_.k0 < span_ ? p_.k - target_.k0 : span_;
        if (panel == 0) {
            odd_ |= decoder_.prepare(target_.k0, rows, first_, end_, scales_);
        }
        // What the panel after the next will read; the last two of a slice lead to the first of the next span.
        const int64_t reach = target_.n + 2 * kPairColumns;
        const int64_t beyond = reach - end_ < end_ - first_ ? reach - end_ : 0;
        target_.ahead = decoder_.bytes(reach < end_ ? reach - target_.n : span_ * p_.n + first_ + beyond - target_.n);
    }

    void decode_pairs(int64_t pairs) {
        if (target_.row >= target_.end) {
            return;
        }
        // Copies, which the compiler keeps in registers: a store to scratch might change any member.
        const PairDecoder<Weight> decoder = decoder_;
        const Target target = target_;
        const int64_t panel = (target.n - first_) / kPairColumns;
        const int64_t end = target.row + 2 * pairs < target.end ? target.row + 2 * pairs : target.end;
        const int64_t stride = column_bytes();
        uint8_t *out = target.out + target.row / 2 * kTileRowBytes;
        const auto put = [&](int64_t i, const __m512i *v) {
            uint8_t *to = out + i * kTileRowBytes;
#pragma GCC unroll 4
            for (int j = 0; j < kPairVectors; ++j) {
                _mm512_store_si512(to + j * stride, v[j]);
            }
        };
        const bool regular =
            decoder.decode(target.k0 + target.row, (end - target.row) / 2, target.n, panel, target.ahead, put);
        odd_ |= static_cast<uint32_t>(!regular) << panel;
        target_.row = end;
    }

    void multiply_slice() {
        odd_ = 0;
        const int64_t panels = (end_ - first_ + kPairColumns - 1) / kPairColumns;
        const int64_t items = (p_.k + span_ - 1) / span_ * panels;
        begin(0, panels);
        decode_pairs(span_ / 2);
        for (int64_t item = 0; item < items; ++item) {
            const int64_t k0 = item / panels * span_;
            const int64_t count = transposed_span_tiles(p_.k, k0, span_);
            const uint8_t *w = panels_ + (item & 1) * transposed_panel_bytes(span_);
            int64_t pairs = 0;  // of the next panel, a step
            if (item + 1 < items) {
                begin(item + 1, panels);
                const int64_t steps = kPairVectors / 2 * groups_ * count;
                pairs = (target_.end / 2 + steps - 1) / steps;
            }
            const auto meanwhile = [&] { decode_pairs(pairs); };
            asm volatile("" ::: "memory");  // the tile loads do not tell the compiler what they read
            for (int64_t tile = 0; tile < kPairVectors; tile += 2) {
                for (int64_t group = 0; group < groups_; ++group) {
                    uint8_t *left = sums_ + ((item % panels * kPairVectors + tile) * groups_ + group) * kTileBytes;
                    const uint8_t *x = x_ + transposed_x_tile(k0, groups_, height_, group, count);
                    multiply_pair_tiles(x, height_ * kTileRowBytes, w + tile * column_bytes(), column_bytes(), count,
                                        k0 == 0, left, left + groups_ * kTileBytes, meanwhile);
                }
            }
            if (item + 1 < items) {
                decode_pairs(span_ / 2);
            }
        }
    }

    // The columns from n on, of all rows.
    void finish(int64_t n) {
        const int64_t count = end_ - n < kPairColumns ? end_ - n : kPairColumns;
        Bfloat *y = static_cast<Bfloat *>(p_.out) + row0_ * p_.n + n;
        for (int64_t row = 0; row < rows_; ++row) {
            const float *sums[kPairVectors];
            for (int64_t j = 0; j < kPairVectors; ++j) {
                const int64_t tile = ((n - first_) / 16 + j) * groups_ + row / kTile;
                sums[j] = reinterpret_cast<const float *>(sums_ + tile * kTileBytes + row % kTile * kTileRowBytes);
            }
            finish_pairs(decoder_.split(), sums, count, y + row * p_.n);
        }
    }

    const TransposedProduct<Weight> &p_;
    int64_t row0_, rows_, n0_, n1_, span_, groups_, height_;
    const uint8_t *x_;
    uint8_t *panels_;
    float *scales_;
    uint8_t *sums_;
    PairDecoder<Weight> decoder_;
    Target target_ = {};
    int64_t first_ = 0, end_ = 0;  // columns of the slice
    uint32_t odd_ = 0;             // a bit for each panel of the slice
};

}  // namespace qcore::cpu::QC_ISA

#endif
#endif  // QCORE_CPU_TRANSPOSED_AMX_H
