// Softplus and its derivative, by polynomials on the lanes of vectors.

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace {

TYPES(float);
typedef int32_t Integers __attribute__((vector_size(BYTES)));

constexpr int64_t CHUNK = 1 << 14;  // numbers that a thread takes at a time

// eˣ for −87 ≤ x ≤ 0: x = n log 2 + r, then a polynomial of r (Cephes) times 2ⁿ.
inline V exponential(V x) {
    const V shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f;  // the nearest integer
    const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    const Integers power = (reinterpret_cast<const Integers&>(shifted) + 127) << 23;  // whose low bits are n
    return p * reinterpret_cast<const V&>(power);
}

// log(1 + e) on [0, 1], by Estrin's scheme: as in pointwise.py, where its coefficients come from.
inline V log_of_one_more(V e, const float* c) {
    const V e2 = e * e, e4 = e2 * e2;
    const V low = (c[0] + c[1] * e) + (c[2] + c[3] * e) * e2;
    const V middle = (c[4] + c[5] * e) + (c[6] + c[7] * e) * e2;
    const V high = (c[8] + c[9] * e) + c[10] * e2;
    return (low + (middle + high * e4) * e4) * e;
}

template <bool SLOPE> inline void softplus(V x, const float* coefficients, V* value, V* slope) {
    const V zero{};
    const V away = x > 0.0f ? -x : x;
    const V e = away < -87.0f ? zero : exponential(away < -87.0f ? zero : away);
    *value = (x > 0.0f ? x : zero) + log_of_one_more(e, coefficients);
    if (SLOPE) {
        const V one = 1.0f / (1.0f + e);
        *slope = x > 0.0f ? one : e * one;
    }
}

template <bool SLOPE>
void all(const float* from, float* values, float* slopes, const float* coefficients, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t start = 0; start < count; start += CHUNK) {
        const int64_t stop = std::min(start + CHUNK, count);
        int64_t i = start;
        V value, slope;
        for (; i + W <= stop; i += W) {
            softplus<SLOPE>(load(from + i), coefficients, &value, &slope);
            store<float>(value, values + i);
            if (SLOPE) store<float>(slope, slopes + i);
        }
        if (i == stop) continue;
        float rest[W] = {};
        std::copy(from + i, from + stop, rest);
        softplus<SLOPE>(load(rest), coefficients, &value, &slope);
        for (int64_t lane = 0; i + lane < stop; ++lane) {
            values[i + lane] = value[lane];
            if (SLOPE) slopes[i + lane] = slope[lane];
        }
    }
}

}  // namespace

extern "C" void softplus_float32(
    const float* from, float* values, float* slopes, const float* coefficients, int64_t count, int threads
) {
    if (slopes)
        all<true>(from, values, slopes, coefficients, count, threads);
    else
        all<false>(from, values, nullptr, coefficients, count, threads);
}
