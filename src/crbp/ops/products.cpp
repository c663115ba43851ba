// Products by frequency of complex matrices, in the order in which a Fourier transform leaves its result.
//
// A spectrum of C × O kernels is packed in blocks of W frequencies: packed[block][c][o][re, im][W]. Images come as
// (B, channels, F), complex and interleaved. All frequencies of a block go through one register tile, so a spectrum
// is read once from memory, however many images there are.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t CHUNK = 8;
constexpr int BYTES = 64, IMAGES = 2, OUTPUTS = 4;
#else
constexpr int BYTES = 32, IMAGES = 2, OUTPUTS = 2;
#endif

template <class T> struct Vector {
    static constexpr int64_t width = BYTES / sizeof(T);
    typedef T type __attribute__((vector_size(BYTES)));
};

// Frequencies [0, count) of a block from re, im, re, im, … to all real parts and then all imaginary parts; the rest zero.
template <class T> void split(const T* __restrict from, T* __restrict to, int64_t count) {
    constexpr int64_t W = Vector<T>::width;
    if (count == W) {
        for (int64_t k = 0; k < W; ++k) to[k] = from[2 * k], to[W + k] = from[2 * k + 1];
        return;
    }
    std::fill(to, to + 2 * W, T(0));
    for (int64_t k = 0; k < count; ++k) to[k] = from[2 * k], to[W + k] = from[2 * k + 1];
}

template <class T> void merge(const T* __restrict from, T* __restrict to, int64_t count) {
    constexpr int64_t W = Vector<T>::width;
    if (count == W) {
        for (int64_t k = 0; k < W; ++k) to[2 * k] = from[k], to[2 * k + 1] = from[W + k];
        return;
    }
    for (int64_t k = 0; k < count; ++k) to[2 * k] = from[k], to[2 * k + 1] = from[W + k];
}

// For M images and N outputs of one block: result[m][n] = Σ_c image[m][c] · matrix[c][n], or with the conjugate of
// the matrix. Strides are in vectors.
template <class T, int M, int N, bool CONJUGATE>
void tile(const typename Vector<T>::type* image, int64_t image_stride, const typename Vector<T>::type* matrix,
          int64_t input_stride, int64_t output_stride, typename Vector<T>::type* result, int64_t result_stride,
          int64_t inputs) {
    typedef typename Vector<T>::type V;
    V real[M][N] = {}, imaginary[M][N] = {};
    for (int64_t c = 0; c < inputs; ++c) {
        V a[N], b[N];
        for (int n = 0; n < N; ++n) {
            a[n] = matrix[c * input_stride + n * output_stride];
            b[n] = matrix[c * input_stride + n * output_stride + 1];
        }
        for (int m = 0; m < M; ++m) {
            const V re = image[m * image_stride + 2 * c], im = image[m * image_stride + 2 * c + 1];
            for (int n = 0; n < N; ++n) {
                real[m][n] += re * a[n];
                imaginary[m][n] += im * a[n];
                if (CONJUGATE) {
                    real[m][n] += im * b[n];
                    imaginary[m][n] -= re * b[n];
                } else {
                    real[m][n] -= im * b[n];
                    imaginary[m][n] += re * b[n];
                }
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            result[m * result_stride + 2 * n] = real[m][n];
            result[m * result_stride + 2 * n + 1] = imaginary[m][n];
        }
}

template <class T, bool CONJUGATE>
void apply_block(const typename Vector<T>::type* image, const typename Vector<T>::type* matrix, int64_t input_stride,
                 int64_t output_stride, typename Vector<T>::type* result, int64_t images, int64_t inputs,
                 int64_t outputs) {
    // The tiles at the edges are smaller.
    const char* next = reinterpret_cast<const char*>(matrix + 2 * inputs * outputs);
    const int64_t bytes = 2 * inputs * outputs * BYTES, share = bytes / ((outputs + OUTPUTS - 1) / OUTPUTS) + 64;
    for (int64_t n = 0; n < outputs; n += OUTPUTS) {
        for (int64_t k = 0; k < share; k += 64) __builtin_prefetch(next + k, 0, 2);
        next += share;
        for (int64_t m = 0; m < images; m += IMAGES) {
            const auto* x = image + m * 2 * inputs;
            const auto* s = matrix + n * output_stride;
            auto* y = result + m * 2 * outputs + 2 * n;
            const bool wide = images - m >= IMAGES;
            if (outputs - n >= OUTPUTS) {
                if (wide)
                    tile<T, IMAGES, OUTPUTS, CONJUGATE>(x, 2 * inputs, s, input_stride, output_stride, y, 2 * outputs, inputs);
                else
                    tile<T, 1, OUTPUTS, CONJUGATE>(x, 2 * inputs, s, input_stride, output_stride, y, 2 * outputs, inputs);
                continue;
            }
            for (int64_t k = 0; k < outputs - n; ++k) {
                const auto* one = s + k * output_stride;
                if (wide)
                    tile<T, IMAGES, 1, CONJUGATE>(x, 2 * inputs, one, input_stride, output_stride, y + 2 * k, 2 * outputs, inputs);
                else
                    tile<T, 1, 1, CONJUGATE>(x, 2 * inputs, one, input_stride, output_stride, y + 2 * k, 2 * outputs, inputs);
            }
        }
    }
}

// Vectors of its own for each thread.
template <class V> V* aligned(std::vector<char>& memory, int64_t vectors) {
    memory.resize((vectors + 1) * sizeof(V));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<V*>((address + BYTES - 1) / BYTES * BYTES);
}

template <class T, bool CONJUGATE>
void apply(const T* image, const T* packed, T* result, int64_t images, int64_t inputs, int64_t outputs,
           int64_t frequencies, int64_t input_stride, int64_t output_stride, int threads) {
    typedef typename Vector<T>::type V;
    constexpr int64_t W = Vector<T>::width;
    const int64_t blocks = (frequencies + W - 1) / W;
    const int64_t chunks = (blocks + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads)
    {
        std::vector<char> memory;
        const int64_t x_block = 2 * images * inputs, y_block = 2 * images * outputs, s_block = 2 * inputs * outputs;
        V* x = aligned<V>(memory, CHUNK * (x_block + y_block));
        V* y = x + CHUNK * x_block;
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t first = chunk * CHUNK, count = std::min(CHUNK, blocks - first);
            const V* matrix = reinterpret_cast<const V*>(packed) + first * s_block;
            for (int64_t i = 0; i < images * inputs; ++i)
                for (int64_t k = 0; k < count; ++k)
                    split<T>(image + 2 * (i * frequencies + (first + k) * W), reinterpret_cast<T*>(x + k * x_block + 2 * i),
                             std::min(W, frequencies - (first + k) * W));
            for (int64_t k = 0; k < count; ++k)
                apply_block<T, CONJUGATE>(x + k * x_block, matrix + k * s_block, input_stride, output_stride, y + k * y_block,
                                          images, inputs, outputs);
            for (int64_t i = 0; i < images * outputs; ++i)
                for (int64_t k = 0; k < count; ++k)
                    merge<T>(reinterpret_cast<const T*>(y + k * y_block + 2 * i), result + 2 * (i * frequencies + (first + k) * W),
                             std::min(W, frequencies - (first + k) * W));
        }
    }
}

// packed[block][c][o] = Σ_b conj(x[b, c]) y[b, o].
template <class T>
void cross(const T* left, const T* right, T* packed, int64_t images, int64_t inputs, int64_t outputs,
           int64_t frequencies, int threads) {
    typedef typename Vector<T>::type V;
    constexpr int64_t W = Vector<T>::width;
    const int64_t blocks = (frequencies + W - 1) / W;
#pragma omp parallel num_threads(threads)
    {
        std::vector<char> memory;
        V* x = aligned<V>(memory, 2 * images * (inputs + outputs));
        V* y = x + 2 * images * inputs;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t count = std::min(W, frequencies - block * W);
            V* matrix = reinterpret_cast<V*>(packed) + block * 2 * inputs * outputs;
            for (int64_t i = 0; i < images * inputs; ++i)
                split<T>(left + 2 * (i * frequencies + block * W), reinterpret_cast<T*>(x + 2 * i), count);
            for (int64_t i = 0; i < images * outputs; ++i)
                split<T>(right + 2 * (i * frequencies + block * W), reinterpret_cast<T*>(y + 2 * i), count);
            for (int64_t c = 0; c < inputs; ++c)
                for (int64_t o = 0; o < outputs; ++o) {
                    V real = {}, imaginary = {};
                    for (int64_t b = 0; b < images; ++b) {
                        const V xr = x[2 * (b * inputs + c)], xi = x[2 * (b * inputs + c) + 1];
                        const V yr = y[2 * (b * outputs + o)], yi = y[2 * (b * outputs + o) + 1];
                        real += xr * yr + xi * yi;
                        imaginary += xr * yi - xi * yr;
                    }
                    matrix[2 * (c * outputs + o)] = real;
                    matrix[2 * (c * outputs + o) + 1] = imaginary;
                }
        }
    }
}

// (O, C, F) to packed, conjugated; and back.
template <class T>
void pack(const T* spectrum, T* packed, int64_t inputs, int64_t outputs, int64_t frequencies, int threads) {
    constexpr int64_t W = Vector<T>::width;
    const int64_t blocks = (frequencies + W - 1) / W;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t c = 0; c < inputs; ++c)
            for (int64_t o = 0; o < outputs; ++o) {
                T* to = packed + ((block * inputs + c) * outputs + o) * 2 * W;
                split<T>(spectrum + 2 * ((o * inputs + c) * frequencies + block * W), to, std::min(W, frequencies - block * W));
                for (int64_t k = W; k < 2 * W; ++k) to[k] = -to[k];
            }
}

template <class T>
void unpack(const T* packed, T* spectrum, int64_t inputs, int64_t outputs, int64_t frequencies, int threads) {
    constexpr int64_t W = Vector<T>::width;
    const int64_t blocks = (frequencies + W - 1) / W;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t c = 0; c < inputs; ++c)
            for (int64_t o = 0; o < outputs; ++o) {
                const T* from = packed + ((block * inputs + c) * outputs + o) * 2 * W;
                T block_of_one[2 * W];
                for (int64_t k = 0; k < W; ++k) block_of_one[k] = from[k], block_of_one[W + k] = -from[W + k];
                merge<T>(block_of_one, spectrum + 2 * ((o * inputs + c) * frequencies + block * W), std::min(W, frequencies - block * W));
            }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
    void correlate_##NAME(const T* image, const T* packed, T* result, int64_t images, int64_t inputs, int64_t outputs, \
                          int64_t frequencies, int threads) {                                                         \
        apply<T, false>(image, packed, result, images, inputs, outputs, frequencies, 2 * outputs, 2, threads);        \
    }                                                                                                                 \
    void convolve_##NAME(const T* image, const T* packed, T* result, int64_t images, int64_t inputs, int64_t outputs,  \
                         int64_t frequencies, int threads) {                                                          \
        apply<T, true>(image, packed, result, images, outputs, inputs, frequencies, 2, 2 * outputs, threads);         \
    }                                                                                                                 \
    void cross_##NAME(const T* left, const T* right, T* packed, int64_t images, int64_t inputs, int64_t outputs,       \
                      int64_t frequencies, int threads) {                                                             \
        cross<T>(left, right, packed, images, inputs, outputs, frequencies, threads);                                 \
    }                                                                                                                 \
    void pack_##NAME(const T* spectrum, T* packed, int64_t inputs, int64_t outputs, int64_t frequencies, int threads) { \
        pack<T>(spectrum, packed, inputs, outputs, frequencies, threads);                                             \
    }                                                                                                                 \
    void unpack_##NAME(const T* packed, T* spectrum, int64_t inputs, int64_t outputs, int64_t frequencies,            \
                       int threads) {                                                                                 \
        unpack<T>(packed, spectrum, inputs, outputs, frequencies, threads);                                           \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(float64, double)
int64_t vector_bytes() { return BYTES; }
}
