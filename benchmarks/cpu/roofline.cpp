// What the machine can do: bytes read from memory in several streams, fused multiply-adds and matrix-unit products in
// registers. Rates of all threads together, in 1e9 a second, by wall clock or, with one thread, by its CPU time.
#include <cstddef>
#include <ctime>
#include <omp.h>
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
typedef float Vector __attribute__((vector_size(BYTES)));
constexpr int LANES = BYTES / 4;
constexpr int STREAMS = 8;
constexpr int CHAINS = 12;  // independent sums: enough to hide the latency of two units

static double now(int threads) {
    timespec t;
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Runs work(thread) on all threads and returns its seconds.
template <class Work>
static double seconds(int threads, Work work) {
    if (threads == 1) {
        const double start = now(1);
        work(0);
        return now(1) - start;
    }
    double start = 0, end = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp barrier
#pragma omp master
        start = now(threads);
#pragma omp barrier
        work(omp_get_thread_num());
#pragma omp barrier
#pragma omp master
        end = now(threads);
    }
    return end - start;
}

static float total(const Vector* sums, int count) {
    float sum = 0;
    for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < LANES; ++lane) sum += sums[i][lane];
    return sum;
}

extern "C" double read_rate(const float* memory, size_t floats, int threads) {
    volatile float sink = 0;
    const size_t length = floats / threads / STREAMS / LANES * LANES;
    const double took = seconds(threads, [&](int thread) {
        Vector sums[STREAMS] = {};
        const float* begin = memory + thread * STREAMS * length;
        for (size_t i = 0; i < length; i += LANES)
            for (int s = 0; s < STREAMS; ++s) {
                const float* p = begin + s * length + i;
                __builtin_prefetch(p + 512);
                sums[s] += *reinterpret_cast<const Vector*>(p);
            }
        sink = total(sums, STREAMS);
    });
    return 4.0 * length * STREAMS * threads / took / 1e9;
}

extern "C" double fma_rate(int threads) {
    volatile float sink = 0;
    constexpr long turns = 10'000'000;
    const double took = seconds(threads, [&](int) {
        Vector sums[CHAINS] = {}, a = {}, b = {};
        a += 0.5f;
        b += 1.0f;
        for (int c = 0; c < CHAINS; ++c) sums[c] += 0.3f * float(c);  // the compiler would make equal chains one
        for (long i = 0; i < turns; ++i) {
#pragma GCC unroll 12
            for (int c = 0; c < CHAINS; ++c) sums[c] = sums[c] * a + b;
        }
        sink = total(sums, CHAINS);
    });
    return 2.0 * LANES * CHAINS * turns * threads / took / 1e9;
}

// Of pairs of bfloat16 in vectors; 0 where nothing multiplies them.
extern "C" double pairs_rate(int threads) {
#ifdef __AVX512BF16__
    volatile float sink = 0;
    constexpr long turns = 5'000'000;
    const double took = seconds(threads, [&](int) {
        __m512 sums[CHAINS];
        for (int c = 0; c < CHAINS; ++c) sums[c] = _mm512_set1_ps(0.3f * float(c));
        const __m512bh pairs = __m512bh(_mm512_set1_epi32(0x3c003c00));
        for (long i = 0; i < turns; ++i) {
#pragma GCC unroll 12
            for (int c = 0; c < CHAINS; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], pairs, pairs);
        }
        for (const __m512 sum : sums) sink = sink + _mm512_reduce_add_ps(sum);
    });
    return 4.0 * 16 * CHAINS * turns * threads / took / 1e9;
#else
    (void)threads;
    return 0;
#endif
}

// 0 where there is no matrix unit; the caller asks the system for it before.
extern "C" double amx_rate(int threads) {
#ifdef __AMX_BF16__
    struct alignas(64) Config {
        unsigned char palette = 1, start = 0, reserved[14] = {};
        unsigned short columns[16] = {};
        unsigned char rows[16] = {};
    };
    constexpr long turns = 500'000;
    const double took = seconds(threads, [&](int) {
        Config config;
        for (int tile = 0; tile < 8; ++tile) config.columns[tile] = 64, config.rows[tile] = 16;
        _tile_loadconfig(&config);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_zero(4);
        _tile_zero(5);
        _tile_zero(6);
        _tile_zero(7);
        for (long i = 0; i < turns; ++i) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_release();
    });
    return 4.0 * 2 * 16 * 16 * 32 * turns * threads / took / 1e9;
#else
    (void)threads;
    return 0;
#endif
}
