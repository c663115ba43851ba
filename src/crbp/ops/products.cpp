// Convolution of images whose rows have been transformed: transforms of the columns, one complex matrix product for
// each frequency, and the transforms back.
//
// Images are (B, channels, H, Q): H rows of Q frequencies, complex and interleaved. Work goes by blocks of W columns,
// the lanes of a vector. A spectrum of C × O kernels is packed as [block of columns][row][c][o][re, im][W], the order
// in which it is used, and is read once however many images there are.

#include <algorithm>
#include <cstdint>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t AHEAD = 12;
#if defined(__AVX512F__)
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

template <class T>
void cross_block(const typename Vector<T>::type* left, const typename Vector<T>::type* right,
                 typename Vector<T>::type* matrix, int64_t images, int64_t inputs, int64_t outputs) {
    typedef typename Vector<T>::type V;
    for (int64_t c = 0; c < inputs; ++c)
        for (int64_t o = 0; o < outputs; ++o, matrix += 2) {
            V real = {}, imaginary = {};
            for (int64_t i = 0; i < images; ++i) {
                const V xr = left[2 * (i * inputs + c)], xi = left[2 * (i * inputs + c) + 1];
                const V yr = right[2 * (i * outputs + o)], yi = right[2 * (i * outputs + o) + 1];
                real += xr * yr + xi * yi;
                imaginary += xr * yi - xi * yr;
            }
            matrix[0] = real, matrix[1] = imaginary;
        }
}

// The discrete Fourier transform of N vectors, N = 2, 3, 4 or 5, in place.
template <class V, int N, bool INVERSE> void butterfly(V* re, V* im) {
    typedef decltype(re[0][0] + re[0][0]) T;
    const T sign = INVERSE ? T(-1) : T(1);
    if constexpr (N == 2) {
        const V r = re[0] - re[1], i = im[0] - im[1];
        re[0] += re[1], im[0] += im[1], re[1] = r, im[1] = i;
    } else if constexpr (N == 4) {
        const V ar = re[0] + re[2], ai = im[0] + im[2], br = re[0] - re[2], bi = im[0] - im[2];
        const V cr = re[1] + re[3], ci = im[1] + im[3], dr = (re[1] - re[3]) * sign, di = (im[1] - im[3]) * sign;
        re[0] = ar + cr, im[0] = ai + ci, re[2] = ar - cr, im[2] = ai - ci;
        re[1] = br + di, im[1] = bi - dr, re[3] = br - di, im[3] = bi + dr;
    } else if constexpr (N == 3) {
        const T half = T(0.5), sine = sign * T(0.86602540378443864676);
        const V sr = re[1] + re[2], si = im[1] + im[2], dr = (re[1] - re[2]) * sine, di = (im[1] - im[2]) * sine;
        const V r = re[0] - sr * half, i = im[0] - si * half;
        re[0] += sr, im[0] += si;
        re[1] = r + di, im[1] = i - dr, re[2] = r - di, im[2] = i + dr;
    } else {
        const T c1 = T(0.30901699437494742410), c2 = T(-0.80901699437494742410);
        const T s1 = sign * T(0.95105651629515357212), s2 = sign * T(0.58778525229247312917);
        const V ar = re[1] + re[4], ai = im[1] + im[4], br = re[1] - re[4], bi = im[1] - im[4];
        const V cr = re[2] + re[3], ci = im[2] + im[3], dr = re[2] - re[3], di = im[2] - im[3];
        const V er = re[0] + ar * c1 + cr * c2, ei = im[0] + ai * c1 + ci * c2;
        const V fr = re[0] + ar * c2 + cr * c1, fi = im[0] + ai * c2 + ci * c1;
        const V gr = br * s1 + dr * s2, gi = bi * s1 + di * s2, hr = br * s2 - dr * s1, hi = bi * s2 - di * s1;
        re[0] += ar + cr, im[0] += ai + ci;
        re[1] = er + gi, im[1] = ei - gr, re[4] = er - gi, im[4] = ei + gr;
        re[2] = fr + hi, im[2] = fi - hr, re[3] = fr - hi, im[3] = fi + hr;
    }
}

// One pass of Stockham's transform: of `length` vectors, `stride` of them side by side, which N divides.
template <class T, int N, bool INVERSE>
void pass(const typename Vector<T>::type* from, typename Vector<T>::type* to, int64_t length, int64_t stride,
          const T* roots, int64_t rows) {
    typedef typename Vector<T>::type V;
    const int64_t parts = length / N, turn = rows / length;
    for (int64_t j = 0; j < parts; ++j) {
        T cosine[N], sine[N];
        for (int k = 1; k < N; ++k) {
            cosine[k] = roots[2 * (j * k * turn)];
            sine[k] = INVERSE ? -roots[2 * (j * k * turn) + 1] : roots[2 * (j * k * turn) + 1];
        }
        for (int64_t q = 0; q < stride; ++q) {
            V re[N], im[N];
            for (int k = 0; k < N; ++k) {
                re[k] = from[2 * (q + stride * (j + parts * k))];
                im[k] = from[2 * (q + stride * (j + parts * k)) + 1];
            }
            butterfly<V, N, INVERSE>(re, im);
            V* at = to + 2 * (q + stride * N * j);
            at[0] = re[0], at[1] = im[0];
            for (int k = 1; k < N; ++k) {
                at[2 * stride * k] = re[k] * cosine[k] - im[k] * sine[k];
                at[2 * stride * k + 1] = re[k] * sine[k] + im[k] * cosine[k];
            }
        }
    }
}

// A column of `rows` vectors, a product of 2, 3 and 5; the result is in one of the two buffers, which is returned.
template <class T, bool INVERSE>
typename Vector<T>::type* transform(typename Vector<T>::type* a, typename Vector<T>::type* b, const T* roots, int64_t rows) {
    int64_t stride = 1;
    for (int64_t length = rows; length > 1;) {
        int64_t radix = 2;
        if (length % 4 == 0)
            radix = 4, pass<T, 4, INVERSE>(a, b, length, stride, roots, rows);
        else if (length % 2 == 0)
            pass<T, 2, INVERSE>(a, b, length, stride, roots, rows);
        else if (length % 3 == 0)
            radix = 3, pass<T, 3, INVERSE>(a, b, length, stride, roots, rows);
        else
            radix = 5, pass<T, 5, INVERSE>(a, b, length, stride, roots, rows);
        length /= radix, stride *= radix;
        std::swap(a, b);
    }
    return a;
}

// The lines of a block in a row that is to come, for the processor does not see such strides by itself.
template <int WRITE, class T> void fetch(const T* from) {
    const char* at = reinterpret_cast<const char*>(from);
    for (int line = 0; line <= 2 * BYTES; line += 64) __builtin_prefetch(at + line, WRITE, 3);
}

// What all functions share: sizes, and the roots of unity exp(−2πi j / rows).
template <class T> struct Plane {
    typedef typename Vector<T>::type V;
    static constexpr int64_t W = Vector<T>::width;
    int64_t height, rows, columns;
    const T* roots;

    int64_t blocks() const { return (columns + W - 1) / W; }
    int64_t lanes(int64_t block) const { return std::min(W, columns - block * W); }

    // Block of columns of one image to all its frequencies, each `step` vectors from the next.
    void forward(const T* image, int64_t block, V* result, int64_t step, V* a, V* b) const {
        for (int64_t r = 0; r < height; ++r) {
            fetch<0>(image + 2 * ((r + AHEAD) * columns + block * W));
            split<T>(image + 2 * (r * columns + block * W), reinterpret_cast<T*>(a + 2 * r), lanes(block));
        }
        for (int64_t r = 2 * height; r < 2 * rows; ++r) a[r] = V{};
        const V* found = transform<T, false>(a, b, roots, rows);
        for (int64_t r = 0; r < rows; ++r) result[r * step] = found[2 * r], result[r * step + 1] = found[2 * r + 1];
    }

    void backward(const V* frequencies, int64_t step, T* image, int64_t block, V* a, V* b) const {
        const T scale = T(1) / T(rows);
        for (int64_t r = 0; r < rows; ++r)
            a[2 * r] = frequencies[r * step] * scale, a[2 * r + 1] = frequencies[r * step + 1] * scale;
        const V* found = transform<T, true>(a, b, roots, rows);
        for (int64_t r = 0; r < height; ++r) {
            fetch<1>(image + 2 * ((r + AHEAD) * columns + block * W));
            merge<T>(reinterpret_cast<const T*>(found + 2 * r), image + 2 * (r * columns + block * W), lanes(block));
        }
    }
};

// The memory that a call is given, from its first whole vector on.
template <class T> typename Vector<T>::type* vectors(T* scratch) {
    const auto address = reinterpret_cast<uintptr_t>(scratch);
    return reinterpret_cast<typename Vector<T>::type*>((address + BYTES - 1) / BYTES * BYTES);
}

int thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// result[b, o] = Σ_c image[b, c] · packed[c, o] by frequency; CONJUGATE: of the other side, with the conjugate. Block after
// block of columns, so that what lies between the transforms stays in the cache.
template <class T, bool CONJUGATE>
void apply(const T* image, const T* packed, T* result, int64_t images, int64_t inputs, int64_t outputs,
           int64_t input_stride, int64_t output_stride, Plane<T> plane, T* scratch, int threads) {
    typedef typename Vector<T>::type V;
    const int64_t rows = plane.rows, size = plane.height * plane.columns * 2;
    const int64_t x_step = 2 * images * inputs, y_step = 2 * images * outputs, s_step = 2 * inputs * outputs;
    V *const x = vectors(scratch), *const y = x + rows * x_step, *const own = y + rows * y_step;
#pragma omp parallel num_threads(threads)
    {
        V *const a = own + thread() * 4 * rows, *const b = a + 2 * rows;
        for (int64_t block = 0; block < plane.blocks(); ++block) {
            const V* matrices = reinterpret_cast<const V*>(packed) + block * rows * s_step;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < images * inputs; ++i)
                plane.forward(image + i * size, block, x + 2 * i, x_step, a, b);
#pragma omp for schedule(static)
            for (int64_t f = 0; f < rows; ++f)
                apply_block<T, CONJUGATE>(x + f * x_step, matrices + f * s_step, input_stride, output_stride,
                                          y + f * y_step, images, inputs, outputs);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < images * outputs; ++i)
                plane.backward(y + 2 * i, y_step, result + i * size, block, a, b);
        }
    }
}

// packed[c][o] = Σ_b conj(left[b, c]) right[b, o] by frequency.
template <class T>
void cross(const T* left, const T* right, T* packed, int64_t images, int64_t inputs, int64_t outputs, Plane<T> plane,
           T* scratch, int threads) {
    typedef typename Vector<T>::type V;
    const int64_t rows = plane.rows, size = plane.height * plane.columns * 2;
    const int64_t x_step = 2 * images * inputs, y_step = 2 * images * outputs, s_step = 2 * inputs * outputs;
    V *const x = vectors(scratch), *const y = x + rows * x_step, *const own = y + rows * y_step;
#pragma omp parallel num_threads(threads)
    {
        V *const a = own + thread() * 4 * rows, *const b = a + 2 * rows;
        for (int64_t block = 0; block < plane.blocks(); ++block) {
            V* matrices = reinterpret_cast<V*>(packed) + block * rows * s_step;
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < images * inputs; ++i)
                plane.forward(left + i * size, block, x + 2 * i, x_step, a, b);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < images * outputs; ++i)
                plane.forward(right + i * size, block, y + 2 * i, y_step, a, b);
#pragma omp for schedule(static)
            for (int64_t f = 0; f < rows; ++f)
                cross_block<T>(x + f * x_step, y + f * y_step, matrices + f * s_step, images, inputs, outputs);
        }
    }
}

// (O, C, rows, columns) to packed, conjugated; and back.
template <class T> void pack(const T* spectrum, T* packed, int64_t inputs, int64_t outputs, Plane<T> plane, int threads) {
    constexpr int64_t W = Vector<T>::width;
    const int64_t rows = plane.rows;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t f = 0; f < plane.blocks() * rows; ++f)
        for (int64_t c = 0; c < inputs; ++c)
            for (int64_t o = 0; o < outputs; ++o) {
                T* to = packed + ((f * inputs + c) * outputs + o) * 2 * W;
                const T* from = spectrum + 2 * (((o * inputs + c) * rows + f % rows) * plane.columns + f / rows * W);
                split<T>(from, to, plane.lanes(f / rows));
                for (int64_t k = W; k < 2 * W; ++k) to[k] = -to[k];
            }
}

template <class T> void unpack(const T* packed, T* spectrum, int64_t inputs, int64_t outputs, Plane<T> plane, int threads) {
    constexpr int64_t W = Vector<T>::width;
    const int64_t rows = plane.rows;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t f = 0; f < plane.blocks() * rows; ++f)
        for (int64_t c = 0; c < inputs; ++c)
            for (int64_t o = 0; o < outputs; ++o) {
                const T* from = packed + ((f * inputs + c) * outputs + o) * 2 * W;
                T* to = spectrum + 2 * (((o * inputs + c) * rows + f % rows) * plane.columns + f / rows * W);
                T conjugate[2 * W];
                for (int64_t k = 0; k < W; ++k) conjugate[k] = from[k], conjugate[W + k] = -from[W + k];
                merge<T>(conjugate, to, plane.lanes(f / rows));
            }
}

}  // namespace

#define SIZES int64_t inputs, int64_t outputs, int64_t height, int64_t rows, int64_t columns
#define EXPORT(NAME, T)                                                                                                \
    void correlate_##NAME(const T* image, const T* packed, T* result, const T* roots, T* scratch, int64_t images,      \
                          SIZES, int threads) {                                                                        \
        const Plane<T> plane{height, rows, columns, roots};                                                            \
        apply<T, false>(image, packed, result, images, inputs, outputs, 2 * outputs, 2, plane, scratch, threads);      \
    }                                                                                                                  \
    void convolve_##NAME(const T* image, const T* packed, T* result, const T* roots, T* scratch, int64_t images,       \
                         SIZES, int threads) {                                                                         \
        const Plane<T> plane{height, rows, columns, roots};                                                            \
        apply<T, true>(image, packed, result, images, outputs, inputs, 2, 2 * outputs, plane, scratch, threads);       \
    }                                                                                                                  \
    void cross_##NAME(const T* left, const T* right, T* packed, const T* roots, T* scratch, int64_t images, SIZES,     \
                      int threads) {                                                                                   \
        const Plane<T> plane{height, rows, columns, roots};                                                            \
        cross<T>(left, right, packed, images, inputs, outputs, plane, scratch, threads);                               \
    }                                                                                                                  \
    void pack_##NAME(const T* spectrum, T* packed, SIZES, int threads) {                                               \
        pack<T>(spectrum, packed, inputs, outputs, Plane<T>{height, rows, columns, nullptr}, threads);                 \
    }                                                                                                                  \
    void unpack_##NAME(const T* packed, T* spectrum, SIZES, int threads) {                                             \
        unpack<T>(packed, spectrum, inputs, outputs, Plane<T>{height, rows, columns, nullptr}, threads);               \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(float64, double)
int64_t vector_bytes() { return BYTES; }
}
