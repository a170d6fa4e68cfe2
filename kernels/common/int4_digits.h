// fp32 activations times weights of four bits, at the rate at which memory
// gives the weights: activations of 24 bits, as three bytes, meet nibbles in an
// instruction that adds up four products of a lane.  Sums within a group are
// exact; 6 instructions for 128 weights, where floats take 8 and as many
// conversions.
#pragma once
#include "int4.h"

#if defined(__AVX512VNNI__)
constexpr int DIGITS = 3;
// A row of x: of each eight inputs the upper bytes (signed), the middle and the
// lower ones, in the order 0 4 1 5 2 6 3 7 as the nibbles of a weight come;
// then, from byte 3 * apart(K) on, per group and digit -8 times the digits'
// sum, which makes the weights' levels 0 .. 15 those of -8 .. 7.
constexpr int64_t digits_bytes(int64_t K) { return 4 * apart(K); }

// x = scale * n with whole |n| < 2^23; a row with NaN or infinity has the scale
// NaN.
inline void split_digits(const float *from, int64_t K, int64_t group,
                         uint8_t *to, float *scale) {
  f32v most = {}, poison = {}; // 0 * NaN and 0 * infinity are NaN
  for (int64_t k = 0; k < K; k += LANES) {
    const f32v v = load(from + k);
    most = larger(most, larger(v, -v));
    poison += v * 0.f;
  }
  const float top = maximum(most);
  const bool finite = sum(poison) == 0,
             some = top > 1e-30f; // of less, no inverse is finite
  constexpr float MOST =
      8388600.f; // its products may be rounded up and stay below 2^23
  *scale = !finite ? NAN : some ? top / MOST : 1.f;
  const float inverse = finite && some ? MOST / top : 0.f;
  const __m512i order =
      _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  const __m512i byte = _mm512_set1_epi32(255);
  int32_t *shift = (int32_t *)(to + DIGITS * apart(K));
  for (int64_t k = 0; k < K;) {
    __m512i total[DIGITS] = {};
    for (const int64_t end = k + group; k < end;
         k += LANES, to += 2 * 8 * DIGITS) {
      const f32v v = finite ? load(from + k) * inverse : f32v{};
      const __m512i n =
          _mm512_permutexvar_epi32(order, _mm512_cvtps_epi32((__m512)v));
      const __m512i digit[DIGITS] = {
          _mm512_srai_epi32(n, 16),
          _mm512_and_si512(_mm512_srli_epi32(n, 8), byte),
          _mm512_and_si512(n, byte)};
      unrolled<DIGITS>([&](auto d) INLINED {
        total[d] = _mm512_add_epi32(total[d], digit[d]);
        const __m128i bytes = _mm512_cvtepi32_epi8(digit[d]);
        _mm_storel_epi64((__m128i *)(to + 8 * d), bytes);
        _mm_storel_epi64((__m128i *)(to + 8 * (DIGITS + d)),
                         _mm_srli_si128(bytes, 8));
      });
    }
    for (int d = 0; d < DIGITS; ++d)
      *shift++ = -8 * _mm512_reduce_add_epi32(total[d]);
  }
}

struct Digits { // three sums for each row and block
  static constexpr int MOST = 6;
  static constexpr int blocks(int64_t M) { return M == 1 ? 4 : M <= 3 ? 2 : 1; }
};

// out[r][m][i] = n of row m . (scale * q) row 16 (b + r) + i, for M rows
// `stride` bytes apart.
template <int M, int R>
inline void int4_digits_tile(const uint8_t *x, int64_t stride, const Int4 &w,
                             int64_t b, float out[R][M][SIDE]) {
  f32v total[R][M] = {};
  const uint32_t *p = w.block(b);
  const bf16 *scale = w.scales(b);
  const int64_t next = w.block(1) - w.packed,
                next_scale = w.scales(1) - w.scale;
  const auto *shift = (const int32_t *)(x + DIGITS * apart(w.k));
  const auto four = [](const uint8_t *at) INLINED {
    return _mm512_set1_epi32(load_as<int32_t>(at));
  };
  for (int64_t g = 0; g < w.k / w.group; ++g, scale += SIDE, shift += DIGITS) {
    __m512i acc[R][M][DIGITS];
    unrolled<R * M * DIGITS>([&](auto i) INLINED {
      constexpr int d = i % DIGITS, m = i / DIGITS % M, r = i / DIGITS / M;
      acc[r][m][d] = _mm512_set1_epi32(shift[m * stride / 4 + d]);
    });
    for (const uint8_t *end = x + w.group * DIGITS; x < end;
         x += 8 * DIGITS, p += SIDE) {
      const uint32_t *ahead = w.ahead(p, b, R);
      unrolled<R>([&](auto r) INLINED {
        __builtin_prefetch(ahead + r * next, 0, 2);
        const u32v v = load_as<u32v>(p + r * next);
        const __m512i half[2] = {(__m512i)(v & 0x0f0f0f0f),
                                 (__m512i)(v >> 4 & 0x0f0f0f0f)};
        unrolled<2 * M>([&](auto i) INLINED {
          constexpr int m = i / 2, h = i % 2;
          const uint8_t *at = x + m * stride + 4 * h;
          __m512i(&sum)[DIGITS] = acc[r][m];
          sum[0] = _mm512_dpbusd_epi32(sum[0], half[h], four(at));
          sum[1] = _mm512_dpbusd_epi32(sum[1], four(at + 8), half[h]);
          sum[2] = _mm512_dpbusd_epi32(sum[2], four(at + 16), half[h]);
        });
      });
    }
    unrolled<R>([&](auto r) INLINED {
      const f32v s = load(scale + r * next_scale);
      unrolled<M>([&](auto m) INLINED {
        const auto wide = [&](int d) INLINED {
          return __builtin_convertvector((i32v)acc[r][m][d], f32v);
        };
        const f32v lower = fma(wide(1), splat(256.f), wide(2));
        total[r][m] = fma(fma(wide(0), splat(65536.f), lower), s, total[r][m]);
      });
    });
  }
  unrolled<R * M>(
      [&](auto i) INLINED { store(out[i / M][i % M], total[i / M][i % M]); });
}

// done(n, m, dot / scale of row m) for outputs n0 <= n < n1 and M rows of x.
template <class Done>
inline void int4_digits_rows(const uint8_t *x, int64_t stride, int64_t M,
                             const Int4 &w, int64_t n0, int64_t n1, Done done) {
  in_tiles<Digits>(
      M, n0, n1,
      [&](auto rows, auto blocks, int64_t m0, int64_t b, auto &out) {
        int4_digits_tile<rows, blocks>(x + m0 * stride, stride, w, b, out);
      },
      done);
}
#endif
