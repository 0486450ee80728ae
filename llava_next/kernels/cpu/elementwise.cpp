// Norms, gates and the rotary embedding in fp32 on a CPU, each in one pass over memory, and their gradients.
//
// Written as torch's single operations each is several passes, which on a CPU cost more than what they compute.
// Rows are dealt to threads in blocks of a fixed size: the result is the same to the bit on any number of threads.
//
// cpu_fused.py compiles, calls and checks: nothing is checked here.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu.h"

namespace {

constexpr int64_t BLOCK_VALUES = 1 << 14;  // what a thread takes at a time: 64 KiB
constexpr int64_t BLOCK_ROWS = 64;         // of a norm: each block has its own sums for the weights' gradients

struct Nothing {};

// Calls run(first, end) for blocks of `count`.
template <typename Run>
void run_blocks(int64_t count, int64_t block, int num_threads, Run run) {
    run_tasks<Nothing>((count + block - 1) / block, num_threads, [&](int64_t task, Nothing&) {
        run(task * block, std::min(count, (task + 1) * block));
    });
}

// The first `count` of a vector's values; the others are 0, and not stored.
inline Vector load(const float* at, int64_t count) {
    Vector value{};
    std::memcpy(&value, at, sizeof(float) * count);
    return value;
}

inline void store(float* at, Vector value, int64_t count) { std::memcpy(at, &value, sizeof(float) * count); }

// Calls each(of, put) for every vector from `first` to `end`: of(p) loads the one of an array p, put(p, v) stores it.
template <typename Each>
inline void for_vectors(int64_t first, int64_t end, Each each) {
    int64_t i = first;
    for (; i + WIDTH <= end; i += WIDTH)
        each([i](const float* p) { return load(p + i); }, [i](float* p, Vector v) { store(p + i, v); });
    if (const int64_t rest = end - i; rest > 0)
        each([i, rest](const float* p) { return load(p + i, rest); },
             [i, rest](float* p, Vector v) { store(p + i, v, rest); });
}

// e^x for x <= 0, within two units of the last place or so: what rounding takes from x / ln 2 is given back.
inline Vector exponential(Vector x) {
    const Vector exponent = x * LOG2_E;
    const Vector product = exponent * 0.693147182f, rest = x - product;
    return power_of_2(exponent) * (1.0f + rest);
}

inline Vector sigmoid(Vector x) {
    const Integers is_negative = x < Vector{};
    const Vector small = exponential(is_negative ? x : -x);  // at most 1, so that nothing overflows
    const Vector share = 1.0f / (1.0f + small);
    return is_negative ? small * share : share;
}

}  // namespace

extern "C" {

// y = weight * x / sqrt(mean(x^2) + eps), over rows of `width`; `inverse` keeps the roots' inverses, one a row.
void llava_next_rms_norm(const float* x, const float* weight, float* y, float* inverse, int64_t num_rows, int64_t width,
                         float eps, int num_threads) {
    run_blocks(num_rows, BLOCK_ROWS, num_threads, [=](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; ++row) {
            const float* from = x + row * width;
            float* to = y + row * width;
            Vector squares{};
            for_vectors(0, width, [&](auto of, auto) { squares += of(from) * of(from); });
            const float factor = 1.0f / std::sqrt(sum(squares) / width + eps);
            for_vectors(0, width, [&](auto of, auto put) { put(to, of(weight) * (of(from) * factor)); });
            inverse[row] = factor;
        }
    });
}

// With h = x * inverse: of_x = inverse * (g * weight - h * mean(g * weight * h)), of_weight = sum over rows of g * h.
void llava_next_rms_norm_backward(const float* x, const float* weight, const float* inverse, const float* g, float* of_x,
                                  float* of_weight, int64_t num_rows, int64_t width, int num_threads) {
    const int64_t num_blocks = (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    std::vector<float> sums(num_blocks * width, 0.0f);
    run_blocks(num_rows, BLOCK_ROWS, num_threads, [&, x, weight, inverse, g, of_x](int64_t first, int64_t end) {
        float* block = sums.data() + first / BLOCK_ROWS * width;
        for (int64_t row = first; row < end; ++row) {
            const float *from = x + row * width, *up = g + row * width;
            float* to = of_x + row * width;
            const float factor = inverse[row];
            Vector products{};
            for_vectors(0, width, [&](auto of, auto put) {
                const Vector share = of(up) * (of(from) * factor);
                products += share * of(weight);
                put(block, of(block) + share);
            });
            const float mean = sum(products) / width;
            for_vectors(0, width, [&](auto of, auto put) {
                put(to, factor * (of(up) * of(weight) - of(from) * factor * mean));
            });
        }
    });
    std::memset(of_weight, 0, sizeof(float) * width);
    for (int64_t i = 0; i < num_blocks; ++i)
        for_vectors(0, width, [&](auto of, auto put) { put(of_weight, of(of_weight) + of(sums.data() + i * width)); });
}

// y = x * sigmoid(beta * x), times `gated` unless that is null: SiLU (beta 1), as a gate or alone, and CLIP's GELU.
void llava_next_swish(const float* x, const float* gated, float* y, int64_t count, float beta, int num_threads) {
    run_blocks(count, BLOCK_VALUES, num_threads, [=](int64_t first, int64_t end) {
        for_vectors(first, end, [&](auto of, auto put) {
            const Vector activated = of(x) * sigmoid(of(x) * beta);
            put(y, gated == nullptr ? activated : activated * of(gated));
        });
    });
}

void llava_next_swish_backward(const float* x, const float* gated, const float* g, float* of_x, float* of_gated,
                               int64_t count, float beta, int num_threads) {
    run_blocks(count, BLOCK_VALUES, num_threads, [=](int64_t first, int64_t end) {
        for_vectors(first, end, [&](auto of, auto put) {
            const Vector share = sigmoid(of(x) * beta), activated = of(x) * share;
            Vector up = of(g);
            if (gated != nullptr) {
                put(of_gated, up * activated);
                up *= of(gated);
            }
            put(of_x, up * (share + beta * activated * (1.0f - share)));
        });
    });
}

// Turns each pair (x[d], x[d + width / 2]) of a head by its position's angle, or back (the gradient). x is [positions,
// heads, width] with these steps, in floats, and a head's values side by side; y is the same, contiguous; cos and sin are
// [positions, width].
void llava_next_rotate(const float* x, int64_t position_step, int64_t head_step, const float* cos, const float* sin,
                       float* y, int64_t num_positions, int64_t heads, int64_t width, int back, int num_threads) {
    const int64_t half = width / 2, block = std::max<int64_t>(1, BLOCK_VALUES / (heads * width));
    run_blocks(num_positions, block, num_threads, [=](int64_t first, int64_t end) {
        for (int64_t position = first; position < end; ++position) {
            const float *c = cos + position * width, *s = sin + position * width;
            for (int64_t head = 0; head < heads; ++head) {
                const float *a = x + position * position_step + head * head_step, *b = a + half;
                float *to_a = y + (position * heads + head) * width, *to_b = to_a + half;
                for_vectors(0, half, [&](auto of, auto put) {
                    put(to_a, back ? of(a) * of(c) + of(b) * of(s + half) : of(a) * of(c) - of(b) * of(s));
                    put(to_b, back ? of(b) * of(c + half) - of(a) * of(s) : of(b) * of(c + half) + of(a) * of(s + half));
                });
            }
        }
    });
}
}
