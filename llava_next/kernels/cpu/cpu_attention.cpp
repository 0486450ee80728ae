// Attention inside the segments of a packed row, and its gradients, in fp32 on a CPU.
//
// The algorithm is FlashAttention's (Dao et al. 2022, arXiv:2205.14135): scores exist for one block of queries and keys
// at a time, in the cache; the softmax is corrected as larger scores come; the backward pass computes the scores again,
// from the logarithm of the softmax's divisor. Exponentials and logarithms are to base 2, which the scale makes up for.
// A task is one head of one segment, and no two tasks write to the same place: the result is the same to the bit on any
// number of threads.
//
// A query sees the first `seen` keys of its segment: its position + 1 where attention is causal, all of them where it is
// not. Along a segment's queries `seen` never falls, so what no query of a strip sees is not computed.
//
// cpu_attention.py compiles, calls and checks: nothing is checked here.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu.h"

namespace {

// ---------------------------------------------------------------------------------------------------- products

// A product is computed in tiles of ROWS x COLUMNS sums that stay in registers: 24 of AVX-512's 32, 12 of AVX2's 16.
constexpr int ROWS = WIDTH == 16 ? 12 : WIDTH == 8 ? 6 : 8;
constexpr int COLUMNS = 2 * WIDTH;

// Queries and keys of a block of scores. The backward pass holds 216 KiB of such, which fit in a core's second cache.
constexpr int BLOCK_QUERIES = 96, BLOCK_KEYS = 256;
static_assert(BLOCK_QUERIES % ROWS == 0 && BLOCK_KEYS % COLUMNS == 0);
// Between two rows of scores. At a power of two they would fight for the same lines of cache.
constexpr int PITCH = BLOCK_KEYS + COLUMNS;

// c[M, VECTORS * WIDTH] (+)= a[M, depth] b[depth, VECTORS * WIDTH], where a's value (m, k) is at a[m * ROW + k * step].
template <int M, int VECTORS, int ROW>
inline void tile(int depth, const float* a, int64_t step, const float* b, int64_t pitch_b, float* c, int64_t pitch_c,
                 bool add) {
    Vector sums[M][VECTORS];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < VECTORS; ++v) sums[m][v] = add ? load(c + m * pitch_c + v * WIDTH) : Vector{};
    for (int k = 0; k < depth; ++k, a += step, b += pitch_b) {
        Vector row[VECTORS];
        for (int v = 0; v < VECTORS; ++v) row[v] = load(b + v * WIDTH);
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < VECTORS; ++v) sums[m][v] += row[v] * a[m * ROW];
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < VECTORS; ++v) store(c + m * pitch_c + v * WIDTH, sums[m][v]);
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]: at most M rows, columns a multiple of WIDTH.
template <int M, int ROW>
inline void strip(int rows, int columns, int depth, const float* a, int64_t step, const float* b, int64_t pitch_b,
                  int64_t panel_b, float* c, int64_t pitch_c, bool add) {
    if constexpr (M > 1) {
        if (rows < M) return strip<M - 1, ROW>(rows, columns, depth, a, step, b, pitch_b, panel_b, c, pitch_c, add);
    }
    int n = 0;
    for (; n + COLUMNS <= columns; n += COLUMNS, b += panel_b)
        tile<M, 2, ROW>(depth, a, step, b, pitch_b, c + n, pitch_c, add);
    if (n < columns) tile<M, 1, ROW>(depth, a, step, b, pitch_b, c + n, pitch_c, add);
}

// scores[rows, columns] = a[rows, width] times transposed rows, from packed strips and panels; columns up to COLUMNS.
inline void scores_of(int rows, int columns, int width, const float* strips, const float* panels, float* scores) {
    strip<ROWS, 1>(rows, columns, width, strips, ROWS, panels, COLUMNS, int64_t{COLUMNS} * width, scores, PITCH, false);
}

// c[rows, width] += scores[rows, depth] b[depth, width]
inline void add_product(int rows, int width, int depth, const float* scores, const float* b, float* c) {
    strip<ROWS, PITCH>(rows, width, depth, scores, 1, b, width, COLUMNS, c, width, true);
}

// c[rows, width] += the transpose of scores[depth, rows] times b[depth, width]
inline void add_transposed_product(int rows, int width, int depth, const float* scores, const float* b, float* c) {
    strip<ROWS, 1>(rows, width, depth, scores, PITCH, b, width, COLUMNS, c, width, true);
}

// A head's rows are far apart in memory, which the processor does not foresee. To ask beyond the last row does no harm.
constexpr int AHEAD = 16;

inline void prefetch(const float* row, int width) {
    for (int d = 0; d < width; d += 16) __builtin_prefetch(row + d);
}

// rows[count, width], one every `pitch`, in groups of SIZE, transposed: [count / SIZE, width, SIZE]; what is missing in
// the last group is zero.
template <int SIZE>
void pack(const float* rows, int64_t pitch, int64_t count, int width, float* groups) {
    for (int64_t start = 0; start < count; start += SIZE, groups += SIZE * width) {
        const int filled = static_cast<int>(std::min<int64_t>(SIZE, count - start));
        if (filled < SIZE) std::memset(groups, 0, sizeof(float) * SIZE * width);
        for (int i = 0; i < filled; ++i) {
            prefetch(rows + (start + i + AHEAD) * pitch, width);
            for (int d = 0; d < width; ++d) groups[d * SIZE + i] = rows[(start + i) * pitch + d];
        }
    }
}

void copy_rows(const float* rows, int64_t pitch, int64_t count, int width, float* to) {
    for (int64_t i = 0; i < count; ++i) {
        prefetch(rows + (i + AHEAD) * pitch, width);
        std::memcpy(to + i * width, rows + i * pitch, sizeof(float) * width);
    }
}

// Memory of a thread that grows as it is asked for, aligned to lines of cache.
class Memory {
   public:
    float* of(int64_t count) {
        if (count > size_) {
            memory_.reset();  // first, so that both do not exist at once
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
            if (!memory_) std::abort();
            size_ = count;
        }
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
};

inline int64_t up_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

}  // namespace

// ---------------------------------------------------------------------------------------------------- what is called

extern "C" {

// [positions, heads, width] with these steps, in floats; a head's values lie side by side.
struct Rows {
    float* data;
    int64_t position, head;
};

// Segment s has the queries query_bounds[s] to query_bounds[s + 1] and the keys key_bounds[s] to key_bounds[s + 1].
// `seen` has one value for each query. Query head h reads head h / group of keys and values. `divisors`, the softmax's
// in logarithm to base 2, are [heads, queries].
struct Problem {
    Rows query, key, value, output;
    float* divisors;
    const int64_t *query_bounds, *key_bounds, *seen;
    int64_t num_segments, num_queries, heads, group;
    int width;
    float scale;
    int num_threads;
};

// Gradients. Those of keys and values are given for each query head: a group's are the caller's to sum.
struct Gradients {
    Rows output, query, key, value;
};
}

namespace {

inline float* at(const Rows& rows, int64_t position, int64_t head) {
    return rows.data + position * rows.position + head * rows.head;
}

// One head of one segment.
struct Task {
    const Problem& problem;
    int64_t head, first_query, num_queries, first_key, num_keys;

    Task(const Problem& p, int64_t segment, int64_t head)
        : problem(p),
          head(head),
          first_query(p.query_bounds[segment]),
          num_queries(p.query_bounds[segment + 1] - first_query),
          first_key(p.key_bounds[segment]),
          num_keys(p.key_bounds[segment + 1] - first_key) {}

    int64_t seen(int64_t query) const { return problem.seen[first_query + query]; }
    int64_t padded_keys() const { return up_to(num_keys, COLUMNS); }
    const float* key() const { return at(problem.key, first_key, head / problem.group); }
    const float* value() const { return at(problem.value, first_key, head / problem.group); }
    float* divisors() const { return problem.divisors + head * problem.num_queries + first_query; }
};

// What a strip of at most ROWS queries sees of a block of keys.
struct Strip {
    int rows, columns;  // columns: of the keys that any of them sees, up to COLUMNS
    int visible[ROWS];  // keys that each sees

    Strip(const Task& task, int64_t query, int rows, int64_t first_key) : rows(rows) {
        const int64_t end = std::min<int64_t>(task.num_keys, first_key + BLOCK_KEYS);
        for (int r = 0; r < rows; ++r)
            visible[r] = static_cast<int>(std::max<int64_t>(0, std::min(task.seen(query + r), end) - first_key));
        columns = static_cast<int>(up_to(visible[rows - 1], COLUMNS));
    }
};

// What a query's softmax is so far: its largest score, and the sum of the weights, each lane's by itself.
struct Softmax {
    float largest = -std::numeric_limits<float>::infinity();
    Vector divisor{};
};

// Scores to what they add to the softmax, for one query. Returns the factor that corrects what was summed up before.
inline float soften(float* scores, int visible, int columns, float scale, Softmax& softmax) {
    if (visible == 0) {
        std::memset(scores, 0, sizeof(float) * columns);
        return 1.0f;
    }
    std::fill(scores + visible, scores + columns, -std::numeric_limits<float>::infinity());
    Vector most[2] = {load(scores), load(scores + WIDTH)};  // two, so that one need not wait for the other
    for (int c = COLUMNS; c < columns; c += COLUMNS)
        for (int v = 0; v < 2; ++v) {
            const Vector next = load(scores + c + v * WIDTH);
            most[v] = most[v] > next ? most[v] : next;
        }
    const float most_of_all = std::max(largest_of(most[0]), largest_of(most[1]));
    const float largest = std::max(softmax.largest, most_of_all * scale);
    const float correction = largest == softmax.largest ? 1.0f : std::exp2(softmax.largest - largest);
    softmax.largest = largest;
    Vector total{};
    for (int c = 0; c < columns; c += WIDTH) {
        const Vector weight = power_of_2(load(scores + c) * scale - largest);
        store(scores + c, weight);
        total += weight;
    }
    softmax.divisor = softmax.divisor * correction + total;
    return correction;
}

struct ForwardMemory {
    Memory queries, keys, values, scores, sums;
    std::array<Softmax, BLOCK_QUERIES> softmax;
};

void forward(const Task& task, ForwardMemory& memory) {
    const Problem& p = task.problem;
    const int width = p.width;
    float* keys = memory.keys.of(task.padded_keys() * width);
    float* values = memory.values.of(task.padded_keys() * width);
    float* queries = memory.queries.of(BLOCK_QUERIES * width);
    float* scores = memory.scores.of(ROWS * PITCH);
    float* sums = memory.sums.of(BLOCK_QUERIES * width);
    const float scale = p.scale * LOG2_E;
    pack<COLUMNS>(task.key(), p.key.position, task.num_keys, width, keys);
    copy_rows(task.value(), p.value.position, task.num_keys, width, values);
    std::memset(values + task.num_keys * width, 0, sizeof(float) * (task.padded_keys() - task.num_keys) * width);

    for (int64_t start = 0; start < task.num_queries; start += BLOCK_QUERIES) {
        const int count = static_cast<int>(std::min<int64_t>(BLOCK_QUERIES, task.num_queries - start));
        pack<ROWS>(at(p.query, task.first_query + start, task.head), p.query.position, count, width, queries);
        std::memset(sums, 0, sizeof(float) * count * width);
        memory.softmax.fill(Softmax());
        const int64_t end = std::min(task.seen(start + count - 1), task.num_keys);
        for (int64_t key = 0; key < end; key += BLOCK_KEYS)
            for (int i = 0; i < count; i += ROWS) {
                const Strip strip(task, start + i, std::min(ROWS, count - i), key);
                if (strip.columns == 0) continue;
                scores_of(strip.rows, strip.columns, width, queries + i * width, keys + key * width, scores);
                for (int r = 0; r < strip.rows; ++r) {
                    const float correction =
                        soften(scores + r * PITCH, strip.visible[r], strip.columns, scale, memory.softmax[i + r]);
                    float* row = sums + (i + r) * width;
                    if (correction != 1.0f)
                        for (int d = 0; d < width; d += WIDTH) store(row + d, load(row + d) * correction);
                }
                add_product(strip.rows, width, strip.columns, scores, values + key * width, sums + i * width);
            }
        for (int i = 0; i < count; ++i) {
            float* output = at(p.output, task.first_query + start + i, task.head);
            const float divisor = sum(memory.softmax[i].divisor);
            for (int d = 0; d < width; d += WIDTH) store(output + d, load(sums + i * width + d) / divisor);
            task.divisors()[start + i] = memory.softmax[i].largest + std::log2(divisor);
        }
    }
}

struct BackwardMemory {
    Memory queries, query_rows, keys, key_rows, values, outputs, output_rows, weights, gradients, shares;
    Memory of_query, of_key, of_value;
};

// Scores and the products of the output's gradient with the values → the softmax's weights and the scores' gradients.
inline void soften_backward(float* scores, float* gradients, int visible, int columns, float scale, float divisor,
                            float share) {
    for (int c = 0; c < columns; c += WIDTH) {
        const Vector weight = power_of_2(load(scores + c) * scale - divisor);
        store(scores + c, weight);
        store(gradients + c, weight * (load(gradients + c) - share));
    }
    // A strip of keys may reach a little further than what these queries see.
    std::memset(scores + visible, 0, sizeof(float) * (columns + ROWS - visible));
    std::memset(gradients + visible, 0, sizeof(float) * (columns + ROWS - visible));
}

// The gradients of scores are without their scale until the sums are done.
inline void copy_scaled(const float* from, float scale, int width, float* to) {
    for (int d = 0; d < width; d += WIDTH) store(to + d, load(from + d) * scale);
}

void backward(const Task& task, const Gradients& g, BackwardMemory& memory) {
    const Problem& p = task.problem;
    const int width = p.width;
    const int64_t size = task.padded_keys() * width;
    float *keys = memory.keys.of(size), *key_rows = memory.key_rows.of(size), *values = memory.values.of(size);
    float *of_key = memory.of_key.of(size), *of_value = memory.of_value.of(size);
    const int64_t block = BLOCK_QUERIES * width;
    float *queries = memory.queries.of(block), *query_rows = memory.query_rows.of(block);
    float *outputs = memory.outputs.of(block), *output_rows = memory.output_rows.of(block);
    float *of_query = memory.of_query.of(block), *shares = memory.shares.of(BLOCK_QUERIES);
    float *weights = memory.weights.of(BLOCK_QUERIES * PITCH), *gradients = memory.gradients.of(BLOCK_QUERIES * PITCH);
    pack<COLUMNS>(task.key(), p.key.position, task.num_keys, width, keys);
    pack<COLUMNS>(task.value(), p.value.position, task.num_keys, width, values);
    copy_rows(task.key(), p.key.position, task.num_keys, width, key_rows);
    std::memset(key_rows + task.num_keys * width, 0, sizeof(float) * (size - task.num_keys * width));
    std::memset(of_key, 0, sizeof(float) * size);
    std::memset(of_value, 0, sizeof(float) * size);

    for (int64_t start = 0; start < task.num_queries; start += BLOCK_QUERIES) {
        const int count = static_cast<int>(std::min<int64_t>(BLOCK_QUERIES, task.num_queries - start));
        const int64_t first = task.first_query + start;
        const float* query = at(p.query, first, task.head);
        const float* gradient = at(g.output, first, task.head);
        pack<ROWS>(query, p.query.position, count, width, queries);
        pack<ROWS>(gradient, g.output.position, count, width, outputs);
        copy_rows(query, p.query.position, count, width, query_rows);
        copy_rows(gradient, g.output.position, count, width, output_rows);
        std::memset(of_query, 0, sizeof(float) * count * width);
        for (int i = 0; i < count; ++i) {
            const float* output = at(p.output, first + i, task.head);
            Vector total{};
            for (int d = 0; d < width; d += WIDTH) total += load(output + d) * load(output_rows + i * width + d);
            shares[i] = sum(total);
        }
        const int64_t end = std::min(task.seen(start + count - 1), task.num_keys);
        for (int64_t key = 0; key < end; key += BLOCK_KEYS) {
            int first_row = count, columns = 0;  // strips before the first row see nothing of this block
            for (int i = 0; i < count; i += ROWS) {
                const Strip strip(task, start + i, std::min(ROWS, count - i), key);
                if (strip.columns == 0) continue;
                first_row = std::min(first_row, i);
                float *weight = weights + i * PITCH, *gradient_row = gradients + i * PITCH;
                scores_of(strip.rows, strip.columns, width, queries + i * width, keys + key * width, weight);
                scores_of(strip.rows, strip.columns, width, outputs + i * width, values + key * width, gradient_row);
                for (int r = 0; r < strip.rows; ++r)
                    soften_backward(weight + r * PITCH, gradient_row + r * PITCH, strip.visible[r], strip.columns,
                                    p.scale * LOG2_E, task.divisors()[start + i + r], shares[i + r]);
                add_product(strip.rows, width, strip.columns, gradient_row, key_rows + key * width,
                            of_query + i * width);
                columns = strip.columns;
            }
            // Transposed, a strip is one of keys. From which query on it is seen, the diagonal says.
            int row = first_row;
            for (int c = 0; c < columns; c += ROWS) {
                while (row < count && task.seen(start + row) - key <= c) ++row;
                const int from = row / ROWS * ROWS;
                const int rows = std::min(ROWS, columns - c);
                add_transposed_product(rows, width, count - from, weights + from * PITCH + c, output_rows + from * width,
                                       of_value + (key + c) * width);
                add_transposed_product(rows, width, count - from, gradients + from * PITCH + c,
                                       query_rows + from * width, of_key + (key + c) * width);
            }
        }
        for (int i = 0; i < count; ++i)
            copy_scaled(of_query + i * width, p.scale, width, at(g.query, first + i, task.head));
    }
    for (int64_t i = 0; i < task.num_keys; ++i) {
        copy_scaled(of_key + i * width, p.scale, width, at(g.key, task.first_key + i, task.head));
        std::memcpy(at(g.value, task.first_key + i, task.head), of_value + i * width, sizeof(float) * width);
    }
}

// Runs all tasks, long segments first.
template <typename ThreadMemory, typename Run>
void run_all(const Problem& p, Run run) {
    std::vector<int64_t> order(p.num_segments);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return p.key_bounds[a + 1] - p.key_bounds[a] > p.key_bounds[b + 1] - p.key_bounds[b];
    });
    run_tasks<ThreadMemory>(p.num_segments * p.heads, p.num_threads, [&](int64_t i, ThreadMemory& memory) {
        run(Task(p, order[i / p.heads], i % p.heads), memory);
    });
}

}  // namespace

extern "C" {

void llava_next_attention(const Problem* problem) {
    run_all<ForwardMemory>(*problem, [](const Task& task, ForwardMemory& memory) { forward(task, memory); });
}

void llava_next_attention_backward(const Problem* problem, const Gradients* gradients) {
    run_all<BackwardMemory>(
        *problem, [&](const Task& task, BackwardMemory& memory) { backward(task, *gradients, memory); });
}
}
