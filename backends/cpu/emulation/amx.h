// The tile instructions of AMX in AVX-512, for a processor that has no tile unit: the build option
// QCORE_CPU_EMULATE_AMX includes this before every kernel file of the path `amx`, so that the suite can run it (nox -s
// amx). For tests alone: it is many times slower than the path below.
//
// As Intel's manual has them: a tile is as large as the configuration says, loads and stores move that much of it, the
// rest of a tile that is loaded or summed becomes zero, and a product whose sizes do not fit each other is an error.
#ifndef QCORE_CPU_EMULATION_AMX_H
#define QCORE_CPU_EMULATION_AMX_H

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1

namespace qcore::cpu::amx::emulation {

struct State {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config;
    alignas(64) uint8_t tile[8][16][64];
};

inline State &state() {
    static thread_local State s = {};
    return s;
}

inline void require(bool holds) {
    if (!holds) {
        std::abort();  // the processor raises #UD or #GP
    }
}

inline void load_config(const void *config) {
    State &s = state();
    std::memcpy(&s.config, config, 64);
    require(s.config.palette == 1);
    for (int t = 0; t < 8; ++t) {
        require(s.config.row_bytes[t] <= 64 && s.config.rows[t] <= 16);
    }
    std::memset(s.tile, 0, sizeof s.tile);
}

inline void release() { state() = {}; }

inline void zero(int t) {
    require(state().config.palette == 1);
    std::memset(state().tile[t], 0, sizeof state().tile[t]);
}

inline void load(int t, const void *base, int64_t stride) {
    State &s = state();
    zero(t);
    for (int r = 0; r < s.config.rows[t]; ++r) {
        std::memcpy(s.tile[t][r], static_cast<const char *>(base) + r * stride, s.config.row_bytes[t]);
    }
}

inline void store(int t, void *base, int64_t stride) {
    State &s = state();
    require(s.config.palette == 1);
    for (int r = 0; r < s.config.rows[t]; ++r) {
        std::memcpy(static_cast<char *>(base) + r * stride, s.tile[t][r], s.config.row_bytes[t]);
    }
}

// Tile c += tile a * tile b, four bytes of a row of `a` with a row of `b` at a time, each `Sum` from zero on.
template <class Sum>
inline void multiply(int c, int a, int b) {
    State &s = state();
    const auto &config = s.config;
    require(config.palette == 1 && c != a && c != b && a != b);
    require(config.rows[c] == config.rows[a] && config.row_bytes[c] == config.row_bytes[b]);
    require(config.row_bytes[a] == 4 * config.rows[b]);
    const auto lanes = static_cast<__mmask16>((1u << (config.row_bytes[c] / 4)) - 1);
    for (int r = 0; r < config.rows[c]; ++r) {
        Sum sum;
        for (int k = 0; k < config.rows[b]; ++k) {
            int32_t four;
            std::memcpy(&four, s.tile[a][r] + 4 * k, sizeof four);
            sum.add(_mm512_set1_epi32(four), _mm512_load_si512(s.tile[b][k]));
        }
        const __m512i total = sum.added_to(_mm512_load_si512(s.tile[c][r]));
        _mm512_store_si512(s.tile[c][r], _mm512_maskz_mov_epi32(lanes, total));
    }
    for (int r = config.rows[c]; r < 16; ++r) {
        std::memset(s.tile[c][r], 0, 64);
    }
}

// TDPBF16PS: even and odd elements have a sum each, which are added to each other and then to the tile.
struct SumOfBf16 {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();

    void add(__m512i x, __m512i y) {
        const __m512i low = _mm512_set1_epi32(0xffff);
        even = product(even, _mm512_and_si512(x, low), _mm512_and_si512(y, low));
        odd = product(odd, _mm512_andnot_si512(low, x), _mm512_andnot_si512(low, y));
    }
    __m512i added_to(__m512i tile) const {
        return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(tile), _mm512_add_ps(even, odd)));
    }

   private:
    static __m512 product(__m512 sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
};

// TDPBSSD: signed by signed; the instruction of AVX-512 wants one of them unsigned.
struct SumOfInt8 {
    __m512i sum = _mm512_setzero_si512();

    void add(__m512i x, __m512i y) {
        const __m512i flipped = _mm512_xor_si512(x, _mm512_set1_epi8(-128));
        const __m512i too_much = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), y);
        sum = _mm512_sub_epi32(_mm512_dpbusd_epi32(sum, flipped, y), too_much);
    }
    __m512i added_to(__m512i tile) const { return _mm512_add_epi32(tile, sum); }
};

}  // namespace qcore::cpu::amx::emulation

// GCC declares these for functions that ask for AMX by an attribute.
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(config) qcore::cpu::amx::emulation::load_config(config)
#define _tile_release() qcore::cpu::amx::emulation::release()
#define _tile_zero(t) qcore::cpu::amx::emulation::zero(t)
#define _tile_loadd(t, base, stride) qcore::cpu::amx::emulation::load(t, base, stride)
#define _tile_stored(t, base, stride) qcore::cpu::amx::emulation::store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) qcore::cpu::amx::emulation::multiply<qcore::cpu::amx::emulation::SumOfBf16>(c, a, b)
#define _tile_dpbssd(c, a, b) qcore::cpu::amx::emulation::multiply<qcore::cpu::amx::emulation::SumOfInt8>(c, a, b)

#endif  // QCORE_CPU_EMULATION_AMX_H
