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

// Half of a vector, down to four values.
template <int COUNT>
struct Part {
    typedef float type __attribute__((vector_size(4 * COUNT)));
};

// All of a vector's values by one operation, in halves: a chain of single values would wait for each before the next.
template <int COUNT, typename Value, typename Operation>
inline float reduce(const Value& value, Operation operation) {
    if constexpr (COUNT == 4) {
        return operation(operation(value[0], value[1]), operation(value[2], value[3]));
    } else {
        typename Part<COUNT / 2>::type low, high;
        std::memcpy(&low, &value, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
        return reduce<COUNT / 2>(operation(low, high), operation);
    }
}

inline float sum(Vector value) {
    return reduce<WIDTH>(value, [](auto a, auto b) { return a + b; });
}

inline float largest_of(Vector value) {
    return reduce<WIDTH>(value, [](auto a, auto b) { return a > b ? a : b; });
}

// 2^x for x <= 0, within a unit of the last place; below 2^-126 it is 0.
inline Vector power_of_2(Vector x) {
    const Vector rounder = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
    const Vector lowest = all(-127.0f);
    x = x < lowest ? lowest : x;  // what is no number stays none
    const Vector rounded = x + rounder;
    const Vector r = x - (rounded - rounder);
    // The polynomial of this degree whose largest relative error for |r| <= 1/2 is smallest (2e-9), by least squares
    // that are weighted anew until the error's peaks are even.
    Vector y = all(1.5353361959569156e-4f);
    y = y * r + 1.3398873852565885e-3f;
    y = y * r + 9.61843691766262e-3f;
    y = y * r + 5.5503323674201965e-2f;
    y = y * r + 0.24022647738456726f;
    y = y * r + 0.6931471824645996f;
    y = y * r + 1.0f;
    Integers bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    bits = (bits << 23) + (127 << 23);  // 2^n, and 0 for n = -127
    Vector power;
    std::memcpy(&power, &bits, sizeof power);
    return y * power;
}

constexpr float LOG2_E = 1.44269504f;

// Calls run(task, memory) for each task from 0 on, on at most this many threads; each takes the next one when it is done.
// Tasks of one thread share a ThreadMemory.
template <typename ThreadMemory, typename Run>
inline void run_tasks(int64_t num_tasks, int num_threads, Run run) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        ThreadMemory memory;
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
