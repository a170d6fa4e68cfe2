// softmax(q k^T * scale) v in blocks: the scores of 6 queries against a block of keys live in the
// first-level cache, and go no further (online softmax).  A thread takes a group of queries of one
// kv head, walks the keys once for all of them, and packs each block of keys (transposed) and of
// values for the register tiles of softmax.h.  Memory beside q, k, v, y: constant.
#include <atomic>
#include <memory>
#include "softmax.h"

struct Shape {
    int64_t batch, heads, kv_heads, queries, keys, dim;
};
struct Strides {  // in elements, of batch, head and token; the last dimension is dense
    int64_t batch, head, token;
};
// Of a block; a multiple of PANEL, and no power of two, whose rows would share sets of the cache.
// Against 128: 1.03 to 1.04 times the rate from 512 tokens on, in fp32 and bf16, on one thread.
// Without AVX-512 bf16 is packed as floats, and a second level of 512 KB hardly holds 320 keys of 128
// beside the rest: 272 gave 1.02 to 1.07 times the rate of 320 there, 1.00 to 1.02 with heads of 64.
constexpr int64_t KEYS = LANES == 16 ? 320 : 272;
constexpr int64_t MOST_QUERIES = 128 * TALL, FEWEST_ROWS = 8 * TALL;  // of queries that share a packed block

static int64_t rounded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Scratch of a thread, and the walk over the keys for one group of queries.
template <class F, class T> class Worker {
    static constexpr int P = F::PER_WORD;
    // rough weights, where they or what they add up to are rounded to bf16
    static constexpr bool ROUGH = P == 2 || (LANES < 16 && std::is_same_v<T, bf16>);
    const int64_t D, words, wide;  // head dim; in words, rounded to 4; in floats, rounded to LANES
    struct Free { void operator()(void* p) const { std::free(p); } };
    std::unique_ptr<char, Free> memory;
    Word *query, *packed_keys, *packed_values, *plain;
    float *out, *score, *top;
    f32v* total;

public:
    Worker(int64_t dim, int64_t rows, int64_t keys)
        : D(dim), words(rounded((dim + P - 1) / P, 4)), wide(rounded(dim, LANES)) {
        const int64_t block = std::min(KEYS, rounded(keys, PANEL));
        const int64_t sizes[] = {rows * words, words * KEYS, block * wide, block * words, rows * wide,
                                 TALL * KEYS, rounded(rows, 16), rows * LANES};
        int64_t all = 0, at = 0;
        for (int64_t s : sizes) all += rounded(s, 16) * 4;
        memory.reset(static_cast<char*>(std::aligned_alloc(64, all)));
        std::memset(memory.get(), 0, all);
        int i = 0;
        const auto next = [&] {
            char* p = memory.get() + at;
            at += rounded(sizes[i++], 16) * 4;
            return p;
        };
        query = (Word*)next();
        packed_keys = (Word*)next();
        packed_values = (Word*)next();
        plain = (Word*)next();
        out = (float*)next();
        score = (float*)next();
        top = (float*)next();
        total = (f32v*)next();
    }

    // Row r of a kv head is query r / group of head r % group: neighbours see the same keys.
    void run(const T* q, Strides qs, const T* k, int64_t k_token, const T* v, int64_t v_token, T* y,
             Strides ys, int64_t first, int64_t rows, int64_t group, int64_t queries, int64_t keys,
             bool causal, float scale) {
        const int64_t padded = rounded(rows, TALL);
        for (int64_t r = 0; r < padded; ++r) {
            const int64_t at = first + (r < rows ? r : rows - 1);  // the last one fills the tile
            F::from(query + r * words, q + at % group * qs.head + at / group * qs.token, D);
            top[r] = -INFINITY;
            total[r] = f32v{};
        }
        std::memset(out, 0, padded * wide * sizeof(float));
        const auto seen = [&](int64_t r) {  // keys that row r may see
            const int64_t at = first + (r < rows ? r : rows - 1);
            return causal ? keys - queries + at / group + 1 : keys;
        };
        const int64_t last = seen(rows - 1);
        for (int64_t s = 0; s < last; s += KEYS) {
            const int64_t n = last - s < KEYS ? last - s : KEYS;
            pack_keys(k + s * k_token, k_token, n);
            pack_values(v + s * v_token, v_token, n);
            for (int64_t r = 0; r < padded; r += TALL) {
                int64_t most = seen(r + TALL - 1) - s;
                if (most > n) most = n;
                if (most <= 0) continue;
                tiles<F, false>(query + r * words, words, packed_keys, KEYS, (D + P - 1) / P, score,
                                KEYS, rounded(most, 2 * LANES), nullptr);
                float now[TALL], keep[TALL];  // all maxima first: each ends in a chain of few
                for (int i = 0; i < TALL; ++i)
                    now[i] = highest(score + i * KEYS, most, seen(r + i) - s, top[r + i]);
                for (int i = 0; i < TALL; ++i) {
                    keep[i] = decay(top[r + i] - now[i], scale);
                    top[r + i] = now[i];
                    total[r + i] *= keep[i];
                    soften(score + i * KEYS, most, now[i], scale, total[r + i]);
                }
                tiles<F, true>(reinterpret_cast<Word*>(score), KEYS, packed_values, wide,
                               (most + P - 1) / P, out + r * wide, wide, wide, keep);
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float *from = out + r * wide, all = lanes_sum(total[r]);
            T* to = y + (first + r) % group * ys.head + (first + r) / group * ys.token;
            fill_row(to, D, false, [&](int64_t i) { return load(from + i) / all; },
                     [&](int64_t i) { return from[i] / all; });
        }
    }

private:
    void pack_keys(const T* k, int64_t token, int64_t n) {
        const int64_t padded = rounded(n, PANEL);
        for (int64_t i = 0; i < n; ++i) F::from(plain + i * words, k + i * token, D);
        std::memset(plain + n * words, 0, (padded - n) * words * sizeof(Word));
        transpose(plain, words, padded, words, packed_keys, KEYS);
    }

    void pack_values(const T* v, int64_t token, int64_t n) {
        if constexpr (P == 1) {
            for (int64_t i = 0; i < n; ++i) F::from(packed_values + i * wide, v + i * token, D);
        } else {
            static const T zeros[512] = {};
            for (int64_t i = 0; i < n; i += 2) {
                const T *a = v + i * token, *b = i + 1 < n ? a + token : zeros;
                Word* to = packed_values + i / 2 * wide;
                int64_t d = 0;
#if defined(__AVX512F__)
                for (; d + LANES <= D; d += LANES) {
                    const __m512i low = _mm512_cvtepu16_epi32(load_as<__m256i>(a + d));
                    const __m512i high = _mm512_cvtepu16_epi32(load_as<__m256i>(b + d));
                    const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
                    std::memcpy(to + d, &both, sizeof both);
                }
#endif
                for (; d < D; ++d) to[d] = Word(a[d].bits) | Word(b[d].bits) << 16;
            }
        }
    }

    // The largest of a row's scores and `top`; those of keys that it may not see become -infinity.
    static float highest(float* s, int64_t n, int64_t visible, float top) {
        const int64_t end = rounded(n, 2 * LANES);
        for (int64_t i = visible < 0 ? 0 : visible; i < end; ++i) s[i] = -INFINITY;
        f32v most = splat(top), other = most;
        for (int64_t i = 0; i < end; i += 2 * LANES) {
            most = larger(most, load(s + i));
            other = larger(other, load(s + i + LANES));
        }
        return largest(larger(most, other));
    }

    // Scores of one row -> weights in F's words, in place; their sum is added.
    static void soften(float* s, int64_t n, float top, float scale, f32v& total) {
        const int64_t end = rounded(n, 2 * LANES);
        f32v part = total;
        for (int64_t i = 0; i < end; i += 2 * LANES) {
            const f32v a = decay<ROUGH>(load(s + i) - top, scale);
            const f32v b = decay<ROUGH>(load(s + i + LANES) - top, scale);
            part += a + b;
            if constexpr (P == 1) {
                store(s + i, a);
                store(s + i + LANES, b);
            } else {
#if defined(__AVX512BF16__)
                const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
                std::memcpy(s + i / 2, &pair, sizeof pair);
#endif
            }
        }
        total = part;
    }
};

template <class F, class T>
static void flash_attention(const T* q, const T* k, const T* v, T* y, const int64_t* shape,
                            const int64_t* strides, bool causal, float scale, int threads) {
    Shape n;
    std::memcpy(&n, shape, sizeof n);
    Strides st[4];  // q, k, v, y
    std::memcpy(st, strides, sizeof st);
    const int64_t group = n.heads / n.kv_heads, all = group * n.queries, pairs = n.batch * n.kv_heads;
    int64_t rows = MOST_QUERIES;
    while (rows > FEWEST_ROWS && (all + rows - 1) / rows * pairs < 4 * threads) rows /= 2;
    const int64_t groups = (all + rows - 1) / rows, units = groups * pairs;
    std::atomic<int64_t> taken{0};
    const auto work = [&] {
        Worker<F, T> worker(n.dim, rounded(all < rows ? all : rows, TALL), n.keys);
        for (int64_t u; (u = taken.fetch_add(1)) < units;) {
            const int64_t first = (groups - 1 - u / pairs) * rows;  // the longest first
            const int64_t b = u % pairs / n.kv_heads, h = u % pairs % n.kv_heads;
            worker.run(q + b * st[0].batch + h * group * st[0].head, st[0],
                       k + b * st[1].batch + h * st[1].head, st[1].token,
                       v + b * st[2].batch + h * st[2].head, st[2].token,
                       y + b * st[3].batch + h * group * st[3].head, st[3], first,
                       all - first < rows ? all - first : rows, group, n.queries, n.keys, causal,
                       scale);
        }
    };
    if (threads <= 1 || units == 1 || all * pairs * n.keys < SERIAL_ELEMENTS / 8) return work();
#pragma omp parallel num_threads(threads)
    work();
}

#if defined(__AVX512BF16__)
using Bf16Words = Pairs;
#else
using Bf16Words = Singles;
#endif
#define ENTRY(T, F, name)                                                                         \
    extern "C" void flash_attention_##name(const T* q, const T* k, const T* v, T* y,              \
                                           const int64_t* shape, const int64_t* strides,          \
                                           int causal, float scale, int threads) {                \
        flash_attention<F>(q, k, v, y, shape, strides, causal, scale, threads);                   \
    }
ENTRY(float, Singles, f32)
ENTRY(bf16, Bf16Words, bf16)
ENTRY(f16, Singles, f16)
