// One step of a Llama-type decoder: embedding, layers, last norm, lm_head, argmax, for B rows of T
// tokens, in one parallel region: threads meet at barriers of their own and never go back to sleep.
// Activations are fp32 whatever the weights; each output is summed in an order that depends neither
// on the batch nor on the number of threads, so a verify step has the bits of single steps.
// A prompt (T > MOST_TOKENS) goes through panels of weights instead: other sums, more arithmetic.
#include <memory>
#include "decoder.h"
#include "decoder_linears.h"

constexpr int64_t MOST_TOKENS = 16;  // of a row, in a step
constexpr int64_t FEW =
    2;  // rows that every thread prepares for itself rather than wait for others

// Tokens of several requests in one step (B tokens, T 1), each request in a span of the slots of a
// cache of one row.  Keys of a step are all written before any is read, so whole prompts may stand
// beside single tokens.
struct Packed {
    const int64_t *starts, *columns;  // (B,) where each token's span begins; which tokens get logits
    int64_t wanted;                   // how many these are
};
static bool is_prompt(int64_t B, int64_t T, const Packed* packed) {
    return (packed ? B : T) > MOST_TOKENS;
}

// What one call works on; the buffers are shared by its threads, but for each one's own.
struct Step {
    const Model& m;
    const int64_t *ids, *positions;  // (B, T)
    int64_t B, T;
    float* logits;    // (B, outputs, V) fp32, or null
    int64_t* argmax;  // (B, outputs), or null
    int64_t outputs;  // tokens per row that get logits: T, 1 for the last, or none
    float *x, *qkv, *attended, *act, *up;
    Buffers shared, own;
    float* scratch;  // this thread's
    Team& team;
    const int thread;
    float* best;  // (threads, B * outputs)
    int64_t* best_at;
    const Packed* packed;  // or null: every row has its own row of the cache
    bool prompt = is_prompt(B, T, packed);  // whether products go through panels of weights

    int64_t rows() const { return B * T; }
    // Which tokens get logits: all of them, or fewer, which then are all that the end works on.
    int64_t wanted() const { return packed ? packed->wanted : B * outputs; }
    bool fewer() const { return wanted() < rows(); }
    int64_t column(int64_t i) const {
        return !fewer() ? i : packed ? packed->columns[i] : i * T + T - 1;
    }
    // The first slot of row b (or of its token's request) for one kv head, in all of the cache.
    int64_t span(int64_t b, int64_t head) const {
        return packed ? head * m.slots + packed->starts[b] : (b * m.kv_heads + head) * m.slots;
    }
    Share share(int64_t total, int64_t unit) const { return {total, thread, team.size, unit}; }

    // Rows of `from` (n, K), normalized when there is a weight, as `l` wants them.
    Rows prepare(const Linear& l, const float* from, const float* norm, int64_t n, int64_t K) {
        const Form form = form_of(l, prompt, m.narrow);
        const Read read = m.far ? STREAMED : BEST_READ;
        if (form == PLAIN && !norm) return {form, from, nullptr, nullptr, n, K, K, read};
        const bool alone = n <= FEW;
        const Buffers& to = alone ? own : shared;
        const int64_t bytes = form == BYTES || form == PLANES ? 3 * apart(K)
                              : form == NIBBLES               ? 4 * apart(K)
                              : form == PAIRED                ? 2 * apart(K)
                                                              : apart(K);
        const Share mine = alone ? Share(n, 0, 1, 1) : share(n, 1);
        for (int64_t r = mine.begin; r < mine.end; ++r) {
            const float* row = from + r * K;
            float* wide = to.wide + r * apart(K);
            if (norm) {
                norm_row(row, norm, wide, K, inverse_rms(row, K, float(m.eps)), false);
                row = wide;
            }
            arrange(form, l.group, row, K, wide, to.bytes + r * bytes, to.scale + r);
        }
        if (!alone) team.meet();
        const bool narrow = form != PLAIN && form != HALVES && to_bytes(form);
        return {form, to.wide, to.bytes, to.scale, n, K, narrow ? bytes : apart(K), read};
    }
    static bool to_bytes(Form form) {
#if defined(__AVX512VNNI__)
        return true;
#else
        return form != QUANTIZED;
#endif
    }
    static void arrange(Form form, int64_t group, const float* row, int64_t K, float* wide,
                        uint8_t* bytes, float* scale) {
        (void)group;
        if (form == HALVES) split_halves(row, K, wide);
        if (form == QUANTIZED) quantize_row(row, K, bytes, wide, scale);
#if defined(__AVX512VNNI__)
        if (form == BYTES) split_bytes(row, K, bytes, scale);
        if (form == PLANES) split_bytes(row, K, bytes, scale, 64, apart(K));
        if (form == NIBBLES) split_digits<3>(row, K, group, bytes);
#endif
        if (form != PAIRED) return;
        fill_row((bf16*)bytes, K, false, [&](int64_t i) { return load(row + i); },
                 [&](int64_t i) { return row[i]; });
        if (K % 2) ((bf16*)bytes)[K] = {0};
    }

    // out[m * stride + n] = (or +=) x row m . w row n * scale + bias, for n0 <= n < n1
    template <bool ADD>
    void linear(const Linear& l, const Rows& x, int64_t n0, int64_t n1, float* out,
                int64_t stride) {
        const auto put = [&](int64_t n, int64_t m, float v) {
            if (l.bias) v += l.bias[n];
            float& to = out[m * stride + n];
            to = ADD ? to + v : v;
        };
        if (prompt) prompt_linear(l, x, n0, n1, scratch, put);
        else step_linear(l, x, n0, n1, scratch, put);
    }
    int64_t unit(const Linear& l) const { return prompt ? SIDE : l.unit(); }

    // this thread's part of several linears of one input, side by side in rows of `out`
    template <int N>
    void linears(const Linear* const (&parts)[N], const Rows& in, float* out, int64_t stride) {
        int64_t total = 0, at = 0;
        for (auto* l : parts) total += l->n;
        const Share mine = share(total, unit(*parts[0]));
        for (auto* l : parts) {
            const int64_t begin = std::max(mine.begin - at, int64_t(0));
            const int64_t end = std::min(mine.end - at, l->n);
            if (begin < end) linear<false>(*l, in, begin, end, out + at, stride);
            at += l->n;
        }
    }

    // Rotates token t of row b, for one kv head and its queries; the cache gets its key and value.
    template <class C>
    void append(const Layer& layer, int64_t b, int64_t head, int64_t t) {
        const int64_t D = m.head_dim, H = m.heads, G = H / m.kv_heads, p = positions[b * T + t];
        float* row = qkv + (b * T + t) * (H + 2 * m.kv_heads) * D;
        const auto turned = [&](float* at, const float* norm, float scale) {
            if (norm) norm_row(at, norm, at, D, inverse_rms(at, D, float(m.eps)), false);
            rotate(at, m.cos + p * D, m.sin + p * D, D);
            for (int64_t d = 0; d < D; ++d) at[d] *= scale;
        };
        float *k = row + (H + head) * D, *v = row + (H + m.kv_heads + head) * D;
        turned(k, layer.k_norm, 1);
        const int64_t slot = (span(b, head) + p) * D;
        for (int64_t d = 0; d < D; ++d) {
            from_float((C*)layer.keys + slot + d, k[d]);
            from_float((C*)layer.values + slot + d, v[d]);
        }
        for (int64_t g = 0; g < G; ++g)
            turned(row + (head * G + g) * D, layer.q_norm, 1.f / std::sqrt(float(D)));
    }
    // Row `to` of `attended` gets what head h of a token sees.
    template <class C>
    void attend_to(const Layer& layer, int64_t token, int64_t h, int64_t to) {
        const int64_t D = m.head_dim, H = m.heads, p = positions[token];
        const int64_t first = m.window && p >= m.window ? p - m.window + 1 : 0;
        const int64_t start = span(token / T, h / (H / m.kv_heads)) * D;
        attend(qkv + (token * (H + 2 * m.kv_heads) + h) * D, (const C*)layer.keys + start,
               (const C*)layer.values + start, first, p, D, attended + (to * H + h) * D);
    }
    template <class C>
    void attention(const Layer& layer, bool last) {
        const int64_t H = m.heads, G = H / m.kv_heads, tasks = B * m.kv_heads;
        const bool some = last && fewer();
        // whether all threads share the queries
        const bool apart = packed || prompt || some || tasks < team.size;
        for (int64_t task = thread; task < tasks; task += team.size) {
            const int64_t b = task / m.kv_heads, head = task % m.kv_heads;
            for (int64_t t = 0; t < T; ++t) append<C>(layer, b, head, t);
            for (int64_t t = 0; t < T && !apart; ++t)
                for (int64_t g = 0; g < G; ++g)
                    attend_to<C>(layer, b * T + t, head * G + g, b * T + t);
        }
        if (!apart) return;
        team.meet();
        for (int64_t i = thread; i < (some ? wanted() : rows()) * H; i += team.size)
            attend_to<C>(layer, some ? column(i / H) : i / H, i % H, i / H);
    }
    // Once the last layer has their keys and values, tokens without logits are done: in columns
    // [begin, end), this thread's own, the others close up.
    void close_up(int64_t begin, int64_t end) {
        const int64_t C = m.hidden;
        for (int64_t i = 0; i < wanted(); ++i)
            std::memmove(x + i * C + begin, x + column(i) * C + begin,
                         (end - begin) * sizeof(float));
        prompt = prompt && wanted() > MOST_TOKENS;
    }

    void feed_forward(const Layer& l, int64_t n) {
        const int64_t C = m.hidden;
        const Rows in = prepare(l.gate, x, l.post_norm, n, C);
        const Share mine = share(m.inner, unit(l.gate));
        linear<false>(l.gate, in, mine.begin, mine.end, act, m.inner);
        linear<false>(l.up, in, mine.begin, mine.end, up, m.inner);
        for (int64_t r = 0; r < n; ++r) {
            float *a = act + r * m.inner + mine.begin, *u = up + r * m.inner + mine.begin;
            fill_row(
                a, mine.end - mine.begin, false,
                [&](int64_t j) { return silu(load(a + j)) * load(u + j); },
                [&](int64_t j) { return silu(splat(a[j]))[0] * u[j]; });
        }
        team.meet();
        const Rows inner = prepare(l.down, act, nullptr, n, m.inner);
        const Share out = share(C, unit(l.down));
        linear<true>(l.down, inner, out.begin, out.end, x, C);
        team.meet();
    }

    void run() {
        const int64_t C = m.hidden, H = m.heads, D = m.head_dim;
        int64_t n = rows();
        const Share mine = share(n, 1);
        for (int64_t r = mine.begin; r < mine.end; ++r) embed_row(m.embed, ids[r], x + r * C);
        team.meet();
        for (int64_t i = 0; i < m.layers; ++i) {
            const Layer& l = m.layer[i];
            linears<3>({&l.q, &l.k, &l.v}, prepare(l.q, x, l.input_norm, n, C), qkv,
                       (H + 2 * m.kv_heads) * D);
            team.meet();
            const bool last = i == m.layers - 1;
            m.cache_bf16 ? attention<bf16>(l, last) : attention<float>(l, last);
            if (last && !wanted()) return;
            team.meet();
            const Share out = share(C, SIDE);
            if (last && fewer()) {
                close_up(out.begin, out.end);
                n = wanted();
            }
            const Rows in = prepare(l.o, attended, nullptr, n, H * D);
            linear<true>(l.o, in, out.begin, out.end, x, C);
            team.meet();
            feed_forward(l, n);
        }
        if (n) predict(n);
    }

    // Logits of the first n rows of x, and which is the largest of each.
    void predict(int64_t n) {
        const Rows in = prepare(m.head, x, m.final_norm, n, m.hidden);
        const Share mine = share(m.vocab, unit(m.head));
        linear<false>(m.head, in, mine.begin, mine.end, logits, m.vocab);
        if (!argmax) return;
        for (int64_t r = 0; r < n; ++r) {
            const float* row = logits + r * m.vocab;
            const float top = greatest(row, mine.begin, mine.end);
            int64_t at = mine.begin;
            while (at + 1 < mine.end && row[at] != top) ++at;
            best[thread * n + r] = top;
            best_at[thread * n + r] = at;
        }
        team.meet();
        if (thread == 0)
            for (int64_t r = 0; r < n; ++r) {
                int most = 0;
                for (int t = 1; t < team.size; ++t)
                    if (best[t * n + r] > best[most * n + r]) most = t;
                argmax[r] = best_at[most * n + r];
            }
    }
};

static int64_t widest(const Model& m) {
    return std::max({m.hidden, m.inner, m.heads * m.head_dim});
}

// The buffers of a call, laid out in one workspace; counts its floats when there is none.
struct Layout {
    float* base;
    int64_t used = 0;
    float *x, *qkv, *attended, *act, *up, *best, *best_at;
    Buffers shared;
    Buffers* own;
    float** scratch;
    float* take(int64_t n) {
        float* p = base ? base + used : nullptr;
        used += (n + 15) / 16 * 16;
        return p;
    }
    Buffers buffers(int64_t rows, int64_t wide) {
        return {take(rows * apart(wide)), (uint8_t*)take(rows * apart(wide)), take(rows)};
    }
    Layout(const Model& m, int64_t B, int64_t T, int64_t threads, bool prompt, float* base,
           Buffers* own = nullptr, float** scratch = nullptr)
        : base(base), own(own), scratch(scratch) {
        const int64_t rows = tall(B * T), wide = widest(m);
        x = take(rows * m.hidden);
        qkv = take(rows * (m.heads + 2 * m.kv_heads) * m.head_dim);
        attended = take(rows * m.heads * m.head_dim);
        act = take(rows * m.inner);
        up = take(rows * m.inner);
        best = take(threads * rows);
        best_at = take(2 * threads * rows);
        shared = buffers(rows, wide);
        for (int64_t t = 0; t < threads; ++t) {
            const Buffers mine = buffers(tall(FEW), wide);
            float* space = take(std::max(BLOCK_ROWS * apart(wide),
                                         prompt ? panel_scratch(rows, wide) : 0));
            if (own) own[t] = mine, scratch[t] = space;
        }
    }
};

// Floats of workspace that `decode_step` needs for this many rows of tokens and threads.
extern "C" int64_t decode_step_workspace(const Model* m, int64_t B, int64_t T, int64_t threads,
                                         const Packed* packed) {
    return Layout(*m, B, T, threads, is_prompt(B, T, packed), nullptr).used;
}

// `steps` > 1 (T and outputs 1): each step's argmax, written after its ids, are the next one's ids.
// Returns 0, or 1 for a token outside the vocabulary, 2 for a position outside the cache.
extern "C" int decode_step(const Model* m, const int64_t* ids, const int64_t* positions, int64_t B,
                           int64_t T, float* logits, int64_t* argmax, int64_t outputs,
                           float* workspace, int threads, int64_t steps, const Packed* packed) {
    for (int64_t i = 0; i < B * T; ++i)
        if (ids[i] < 0 || ids[i] >= m->vocab) return 1;
    for (int64_t i = 0; i < B * T * steps; ++i)
        if (positions[i] < 0 || positions[i] >= m->slots) return 2;
    for (int64_t i = 0; packed && i < B; ++i)
        if (packed->starts[i] < 0 || packed->starts[i] + positions[i] >= m->slots) return 2;
    const std::unique_ptr<Buffers[]> own(new Buffers[threads]);
    const std::unique_ptr<float*[]> scratch(new float*[threads]);
    const bool prompt = is_prompt(B, T, packed);
    const Layout l(*m, B, T, threads, prompt, workspace, own.get(), scratch.get());
    const auto run = [&](int thread, Team& team) {
        for (int64_t i = 0; i < steps; ++i) {
            Step{*m,
                 ids + i * B * T,
                 positions + i * B * T,
                 B,
                 T,
                 logits,
                 argmax ? argmax + i * B : nullptr,
                 outputs,
                 l.x,
                 l.qkv,
                 l.attended,
                 l.act,
                 l.up,
                 l.shared,
                 own[thread],
                 scratch[thread],
                 team,
                 thread,
                 l.best,
                 (int64_t*)l.best_at,
                 packed}
                .run();
            if (i + 1 < steps) team.meet();
        }
    };
    in_team(threads, run);
    return 0;
}
