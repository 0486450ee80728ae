// What this package's C++ is written with: vectors, and threads that are torch's. Nothing but the standard library.
//
// Vectors are GCC's and Clang's own type; their width follows from the instructions that a file is compiled for.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

// What GCC calls where a program says `#pragma omp parallel`. Found in whatever OpenMP the process runs, torch's above
// all: its threads wait for work busily, and would be in the way of others. Where there is none, threads are started.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned num_threads, unsigned flags)
    __attribute__((weak));

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));

inline Vector load(const float* at) {
    Vector value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

inline void store(float* at, Vector value) { std::memcpy(at, &value, sizeof value); }

inline Vector all(float value) { return Vector{} + value; }

inline float sum(Vector value) {
    float total = 0;
    for (int i = 0; i < WIDTH; ++i) total += value[i];
    return total;
}

// e^x for x <= 0, within two units of the last place; below e^-87 it is 0.
inline Vector exponential(Vector x) {
    const Vector rounder = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    const Integers is_low = x < all(-87.0f);
    x = is_low ? Vector{} : x;
    const Vector rounded = x * 1.44269504f + rounder;
    const Vector n = rounded - rounder;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    Vector y = all(1.0f / 5040);  // Taylor's polynomial, |r| <= ln(2) / 2
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    Integers bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits = (bits << 23) + (127 << 23);  // 2^n
    Vector power;
    std::memcpy(&power, &bits, sizeof power);
    return is_low ? Vector{} : y * power;
}

// Calls run(task) for each task from 0 on, on at most this many threads; each takes the next one when it is done.
// `start` is called once on each thread, for the memory that its tasks share.
template <typename Start, typename Run>
inline void run_tasks(int64_t num_tasks, int num_threads, Start start, Run run) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        auto memory = start();
        for (int64_t task = next++; task < num_tasks; task = next++) run(task, memory);
    };
    const auto num_workers = static_cast<unsigned>(std::min<int64_t>(num_threads, num_tasks));
    if (num_workers <= 1) return work();
    if (GOMP_parallel != nullptr)
        return GOMP_parallel([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, num_workers, 0);
    std::vector<std::thread> others;
    for (unsigned i = 1; i < num_workers; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
}

}  // namespace
