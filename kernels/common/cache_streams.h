// Attention over one chunk of cached keys and values without AVX-512: keys are met in four streams,
// each on through its own part of the chunk, and every key from its first byte to its last.  The
// hardware fetches ahead in each of them, and does it better than instructions do: only pages so
// short that it hardly begins are fetched by hand.
#pragma once
#include "cache_units.h"

// Loaded once: the compiler would load it for each product that it is a factor of.
INLINED inline void hold(f32v& v) {
#if defined(__SSE2__)
    asm("" : "+x"(v));
#endif
}

// Two vectors of numbers from p on: one after the other, or every other one where that is cheaper.
struct Two {
    f32v a, b;
};
template <class T> inline Two load_two(const T* p) { return {load(p), load(p + LANES)}; }
inline Two load_two(const bf16* p) {
    const u32v pairs = load_as<u32v>(p);
    return {(f32v)(pairs << 16), (f32v)(pairs & 0xffff0000u)};
}

template <class T> class AttendStreams {
    static constexpr bool EVERY_OTHER = std::is_same_v<T, bf16>;
    // One thread of a Zen 3, reading only, nothing fetched by hand, of a linear read's rate: random
    // pages of 8 KB 0.6 one at a time and 1.0 four at a time; of 4 KB 0.45 and 0.87; four far places
    // of one cache 1.36.  Here eight streams gave 0.8 to 0.9 of the rate of four; four that do not
    // begin their pages together, 0.75 to 0.95.
    static constexpr int64_t STREAMS = 4, STEP = 2 * LANES;
    // Keys from the one that is met to the one that is fetched, and the longest pages, in bytes,
    // that are: 1.15 to 1.2 times the rate of pages of 4 KB, 0.9 of 8 KB and 0.84 of whole caches.
    static constexpr int64_t AHEAD = 8, SHORT_PAGE = 4096;
    static constexpr int64_t ROOM = CHUNK + STEP;  // chunks are filled up to whole steps
    const Cached& c;
    const T *k, *v;
    const int32_t* table;
    const int64_t dim, padded, wide, rows;  // padded: to whole steps
    std::unique_ptr<float[]> score, query;
    const T *keys[ROOM], *values[ROOM];    // in the order in which they are met
    int32_t place[ROOM];                   // of a key in the chunk
    int64_t count = 0;
    const bool fetches;
    T zeros[512] = {};  // of the keys that fill a chunk up

public:
    AttendStreams(const Cached& c, const T* k, const T* v, const int32_t* table)
        : c(c), k(k), v(v), table(table), dim(c.dim), padded((dim + STEP - 1) / STEP * STEP),
          wide((c.dim + PANEL - 1) / PANEL * PANEL), rows(c.heads / c.kv_heads * c.queries),
          score(new float[rows * ROOM]), query(new float[rows * padded]),
          fetches(table && c.page * c.dim * int64_t(sizeof(T)) <= SHORT_PAGE) {}

    // Where the keys and values of this unit stand.
    void find(const Unit& unit, const Unit&) {
        const int64_t n = std::max<int64_t>(unit.last - unit.first, 0);
        const int64_t part = (n + STEP - 1) / STEP * (STEP / STREAMS);
        count = part * STREAMS;
        int64_t page = unit.b, slot = unit.first;
        for (int64_t i = 0; i < count; ++i, ++slot) {
            const int64_t at = i % part * STREAMS + i / part;
            place[at] = int32_t(i);
            if (i >= n) {
                keys[at] = values[at] = zeros;
                continue;
            }
            if (table && (i == 0 || slot == c.page)) {
                page = table[unit.b * c.max_blocks + (unit.first + i) / c.page];
                slot = (unit.first + i) % c.page;
            }
            keys[at] = k + page * c.k[0] + unit.h * c.k[1] + slot * c.k[2];
            values[at] = v + page * c.v[0] + unit.h * c.v[1] + slot * c.v[2];
        }
    }

    // Row r of q (rows, apart) sees `seen(r)` keys of the unit that was found.
    template <class Seen>
    void chunk(const float* q, int64_t q_stride, const Unit& unit, Seen seen, Partial* state,
               float* out) {
        std::memset(out, 0, rows * wide * sizeof(float));
        for (int64_t r = 0; r < rows; ++r) {
            state[r] = {-INFINITY, 0};
            arrange(q + r * q_stride, query.get() + r * padded);
        }
        by_rows([&](auto held, int64_t r) { scores<decltype(held)::value>(r); });
        for (int64_t r = 0; r < rows; ++r)
            soften(score.get() + r * ROOM, std::min(seen(r), unit.last) - unit.first, state[r]);
        weigh_all(out);
        if (EVERY_OTHER)
            for (int64_t r = 0; r < rows; ++r) put_back(out + r * wide);
    }

private:
    // f(rows at once, first of them): the sums of R rows and LANES / R keys stay in registers.
    template <class F> void by_rows(F f) const {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>(), r);
        if (r + 2 <= rows) f(std::integral_constant<int, 2>(), r), r += 2;
        if (r < rows) f(std::integral_constant<int, 1>(), r);
    }

    // A query in the order in which load_two gives numbers, and zeros behind it.
    void arrange(const float* from, float* to) const {
        std::memset(to, 0, padded * sizeof(float));
        for (int64_t d = 0; d < dim; ++d) {
            const int64_t i = d % STEP;
            to[d - i + (EVERY_OTHER ? i % 2 * LANES + i / 2 : i)] = from[d];
        }
    }
    void put_back(float* row) const {
        for (int64_t d = 0; d < padded; d += STEP) {
            float step[STEP];
            std::memcpy(step, row + d, sizeof step);
            for (int i = 0; i < LANES; ++i) {
                row[d + 2 * i] = step[i];
                row[d + 2 * i + 1] = step[LANES + i];
            }
        }
    }

    // Inlined: GCC takes a function that only fetches for one without effects, and leaves it out.
    INLINED void fetch(const T* const* from, int64_t at, int64_t keys) const {
        if (fetches)
            for (int64_t i = at + AHEAD; i < std::min(at + AHEAD + keys, count); ++i)
                for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T)))
                    __builtin_prefetch(from[i] + d, 0, 2);
    }

    // f(d, i -> a step of numbers from d on of from[i]) for all of a row; the last ones are copied.
    template <int N, class F> INLINED void by_steps(const T* const* from, F f) const {
        int64_t d = 0;
        for (; d + STEP <= dim; d += STEP)
            f(d, [&](auto i) INLINED { return load_two(from[i] + d); });
        if (d < dim) {
            T tail[N][STEP] = {};
            for (int i = 0; i < N; ++i) std::memcpy(tail[i], from[i] + d, (dim - d) * sizeof(T));
            f(d, [&](auto i) INLINED { return load_two(tail[i]); });
        }
    }

    // score[r][i] = query row r . key i
    template <int R> void scores(int64_t first) const {
        constexpr int KEYS = LANES / R;
        const float* q = query.get() + first * padded;
        for (int64_t at = 0; at < count; at += KEYS) {
            if (first == 0) fetch(keys, at, KEYS);
            f32v acc[LANES] = {};
            by_steps<KEYS>(keys + at, [&](int64_t d, auto numbers) INLINED {
                Two key[KEYS];
                unrolled<KEYS>([&](auto i) INLINED { key[i] = numbers(i); });
                unrolled<R>([&](auto r) INLINED {
                    f32v one = load(q + r * padded + d);
                    hold(one);
                    unrolled<KEYS>([&](auto i) INLINED {
                        acc[r * KEYS + i] = fma(one, key[i].a, acc[r * KEYS + i]);
                    });
                });
                unrolled<R>([&](auto r) INLINED {
                    f32v one = load(q + r * padded + d + LANES);
                    hold(one);
                    unrolled<KEYS>([&](auto i) INLINED {
                        acc[r * KEYS + i] = fma(one, key[i].b, acc[r * KEYS + i]);
                    });
                });
            });
            float all[LANES];
            store(all, sums(acc));
            for (int r = 0; r < R; ++r)
                std::memcpy(score.get() + (first + r) * ROOM + at, all + r * KEYS,
                            KEYS * sizeof(float));
        }
    }

    // Scores -> weights, of the keys that this row sees.
    void soften(float* s, int64_t visible, Partial& state) const {
        if (visible <= 0) {
            std::memset(s, 0, count * sizeof(float));
            return;
        }
        if (visible < count)
            for (int64_t i = 0; i < count; ++i)
                if (place[i] >= visible) s[i] = -INFINITY;
        f32v most = splat(-INFINITY), other = most;
        for (int64_t i = 0; i < count; i += 2 * LANES) {
            most = larger(most, load(s + i));
            other = larger(other, load(s + i + LANES));
        }
        const float top = largest(larger(most, other));
        f32v part = {}, more = {};
        for (int64_t i = 0; i < count; i += 2 * LANES) {
            const f32v a = decay<EVERY_OTHER>(load(s + i) - top, scale);
            const f32v b = decay<EVERY_OTHER>(load(s + i + LANES) - top, scale);
            part += a;
            more += b;
            store(s + i, a);
            store(s + i + LANES, b);
        }
        state = {top, lanes_sum(part + more)};
    }

    void weigh_all(float* out) const {
        for (int64_t at = 0; at < count; at += 8) {
            fetch(values, at, 8);
            for (int i = 0; i < 8; i += 4)  // other rows between: sums are back in memory by then
                for (int64_t r = 0; r + 2 <= rows; r += 2) weigh<2>(r, at + i, out + r * wide);
            if (rows % 2) weigh<1>(rows - 1, at, out + (rows - 1) * wide);
        }
    }

    // out[r] += sum_i weight[r][i] values[i]: eight weights stay in registers, sums in the first-level
    // cache.  Four rows and two keys at once would store every sum twice as often.
    template <int R> INLINED void weigh(int64_t first, int64_t at, float* out) const {
        constexpr int KEYS = 8 / R;
        const float* p = score.get() + first * ROOM + at;
        f32v weight[R][KEYS];
        unrolled<R>([&](auto r) INLINED {
            unrolled<KEYS>([&](auto i) INLINED { weight[r][i] = splat(p[r * ROOM + i]); });
        });
        by_steps<KEYS>(values + at, [&](int64_t d, auto numbers) INLINED {
            f32v a[R], b[R];
            unrolled<R>([&](auto r) INLINED {
                a[r] = load(out + r * wide + d);
                b[r] = load(out + r * wide + d + LANES);
            });
            unrolled<KEYS>([&](auto i) INLINED {
                Two value = numbers(i);
                hold(value.a), hold(value.b);
                unrolled<R>([&](auto r) INLINED {
                    a[r] = fma(weight[r][i], value.a, a[r]);
                    b[r] = fma(weight[r][i], value.b, b[r]);
                });
            });
            unrolled<R>([&](auto r) INLINED {
                store(out + r * wide + d, a[r]);
                store(out + r * wide + d + LANES, b[r]);
            });
        });
    }

public:
    float scale = 1;
    int64_t width() const { return wide; }
};
