// Correlation of images with kernels by Fourier transform, tile by tile.
//
// An image (B, C, H, W) is cut into tiles, each with as much around it as the kernel reaches, and two tiles are the real
// and the imaginary part of one complex plane: what kernels of real numbers make of it are again two tiles. The lanes of
// a vector are channels, so that transforms need no shuffling whatever their size. A few planes at a time, a panel that
// fits the cache, are transformed, multiplied by the spectrum frequency by frequency, and transformed back.
//
// A spectrum of C × O kernels is [column][row][re, im][c][o], columns up to the half; o is padded to whole vectors.

#include "lanes.h"

#include <algorithm>
#include <cstring>

namespace {

// What a call is about, in the order in which it comes from Python.
struct Sizes {
    int64_t images, inputs, outputs, height, width;  // of the images
    int64_t rows, columns;                           // of the plane in which they are transformed
    int64_t tall, wide;                              // of what one tile yields
    int64_t above, left;                             // half the kernel

    int64_t down() const { return (height + tall - 1) / tall; }
    int64_t across() const { return (width + wide - 1) / wide; }
    int64_t tiles() const { return images * down() * across(); }
    int64_t planes() const { return (tiles() + 1) / 2; }
    int64_t half() const { return columns / 2 + 1; }
    // A plane of complex vectors; rows are kept off powers of two, which would share few places of the cache.
    int64_t step() const { return 2 * (columns + 1); }
    int64_t size() const { return rows * step(); }
    int64_t at(int64_t r, int64_t q) const { return r * step() + 2 * q; }
    // Where the frequency is that is minus this one.
    int64_t minus(int64_t r, int64_t q) const { return at(r ? rows - r : 0, q ? columns - q : 0); }
    // Whether a column holds both a frequency and its negative.
    bool edge(int64_t q) const { return q == 0 || 2 * q == columns; }
};

// ---- Vectors of channels ---------------------------------------------------------------------------------------------

// W vectors, of which each becomes the lane of W others: log2(W) rounds of merging the first half with the second.
template <class T> void transpose(typename Types<T>::V* x) {
    TYPES(T);
    constexpr std::make_integer_sequence<int, W> lanes;
    for (int64_t round = 1; round < W; round *= 2) {
        V y[W];
        for (int64_t k = 0; k < W / 2; ++k) {
            y[2 * k] = merge<T, 0>(x[k], x[k + W / 2], lanes);
            y[2 * k + 1] = merge<T, W / 2>(x[k], x[k + W / 2], lanes);
        }
        std::copy(y, y + W, x);
    }
}

// Some pixels of a row, of up to W channels that are `area` apart, each to one vector; `write` takes place and vector.
template <class T, class Write>
void gather(const T* from, int64_t area, int64_t channels, int64_t pixels, const T* end, Write write) {
    TYPES(T);
    for (int64_t p = 0; p < pixels; p += W) {
        V x[W];
        for (int64_t c = 0; c < W; ++c) {
            const T* at = from + c * area + p;
            if (c < channels && at + W <= end) {
                x[c] = load(at);  // what is read beyond the last pixel is not used
                continue;
            }
            x[c] = V{};
            for (int64_t k = 0; c < channels && k < std::min(W, pixels - p); ++k) x[c][k] = at[k];
        }
        transpose<T>(x);
        const int64_t count = std::min(W, pixels - p);
        for (int64_t k = 0; k < count; ++k) write(p + k, x[k]);
    }
}

// The way back: every second of the vectors, times a number.
template <class T>
void scatter(const typename Types<T>::V* from, T scale, T* to, int64_t area, int64_t channels, int64_t pixels) {
    TYPES(T);
    for (int64_t p = 0; p < pixels; p += W) {
        V x[W];
        const int64_t count = std::min(W, pixels - p);
        for (int64_t k = 0; k < W; ++k) x[k] = k < count ? from[2 * (p + k)] * scale : V{};
        transpose<T>(x);
        for (int64_t c = 0; c < channels; ++c)
            if (count == W)
                store(x[c], to + c * area + p);
            else
                std::memcpy(to + c * area + p, &x[c], count * sizeof(T));
    }
}

// ---- The Fourier transform -------------------------------------------------------------------------------------------

// Of N vectors, N = 2, 3, 4, 5, 6 or 8, in place.
template <class V, int N, bool INVERSE> inline void butterfly(V* re, V* im) {
    typedef std::decay_t<decltype(re[0][0])> T;
    const T sign = INVERSE ? T(-1) : T(1);
    if constexpr (N == 2) {
        const V r = re[0] - re[1], i = im[0] - im[1];
        re[0] += re[1], im[0] += im[1], re[1] = r, im[1] = i;
    } else if constexpr (N == 4) {
        const V ar = re[0] + re[2], ai = im[0] + im[2], br = re[0] - re[2], bi = im[0] - im[2];
        const V cr = re[1] + re[3], ci = im[1] + im[3], dr = re[1] - re[3], di = im[1] - im[3];
        re[0] = ar + cr, im[0] = ai + ci, re[2] = ar - cr, im[2] = ai - ci;
        re[INVERSE ? 3 : 1] = br + di, im[INVERSE ? 3 : 1] = bi - dr;
        re[INVERSE ? 1 : 3] = br - di, im[INVERSE ? 1 : 3] = bi + dr;
    } else if constexpr (N == 3) {
        const T half = T(0.5), sine = sign * T(0.86602540378443864676);
        const V sr = re[1] + re[2], si = im[1] + im[2], dr = (re[1] - re[2]) * sine, di = (im[1] - im[2]) * sine;
        const V r = re[0] - sr * half, i = im[0] - si * half;
        re[0] += sr, im[0] += si;
        re[1] = r + di, im[1] = i - dr, re[2] = r - di, im[2] = i + dr;
    } else if constexpr (N == 5) {
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
    } else if constexpr (N == 6) {
        // Good's way: of 2 · 3 points, without factors in between.
        V er[3] = {re[0], re[2], re[4]}, ei[3] = {im[0], im[2], im[4]};
        V odd[3] = {re[3], re[5], re[1]}, oi[3] = {im[3], im[5], im[1]};
        butterfly<V, 3, INVERSE>(er, ei);
        butterfly<V, 3, INVERSE>(odd, oi);
        for (int k = 0; k < 3; ++k) {
            const int even = 4 * k % 6, other = (4 * k + 3) % 6;
            re[even] = er[k] + odd[k], im[even] = ei[k] + oi[k];
            re[other] = er[k] - odd[k], im[other] = ei[k] - oi[k];
        }
    } else {
        const T c = T(0.70710678118654752440);
        V er[4] = {re[0], re[2], re[4], re[6]}, ei[4] = {im[0], im[2], im[4], im[6]};
        V odd[4] = {re[1], re[3], re[5], re[7]}, oi[4] = {im[1], im[3], im[5], im[7]};
        butterfly<V, 4, INVERSE>(er, ei);
        butterfly<V, 4, INVERSE>(odd, oi);
        const V ar = (odd[1] + oi[1] * sign) * c, ai = (oi[1] - odd[1] * sign) * c;
        const V br = oi[2] * sign, bi = odd[2] * -sign;
        const V dr = (oi[3] * sign - odd[3]) * c, di = (odd[3] * -sign - oi[3]) * c;
        re[0] = er[0] + odd[0], im[0] = ei[0] + oi[0], re[4] = er[0] - odd[0], im[4] = ei[0] - oi[0];
        re[1] = er[1] + ar, im[1] = ei[1] + ai, re[5] = er[1] - ar, im[5] = ei[1] - ai;
        re[2] = er[2] + br, im[2] = ei[2] + bi, re[6] = er[2] - br, im[6] = ei[2] - bi;
        re[3] = er[3] + dr, im[3] = ei[3] + di, re[7] = er[3] - dr, im[7] = ei[3] - di;
    }
}

// One pass of Stockham's transform of `size` vectors: of `length`, which N divides, `side` of them side by side.
template <class T, int N, bool INVERSE>
void pass(const typename Types<T>::V* from, int64_t in, typename Types<T>::V* to, int64_t out, int64_t length,
          int64_t side, const T* roots, int64_t size) {
    TYPES(T);
    const int64_t parts = length / N, turn = size / length;
    for (int64_t j = 0; j < parts; ++j) {
        T cosine[N], sine[N];
        for (int k = 1; k < N; ++k) {
            cosine[k] = roots[2 * (j * k * turn)];
            sine[k] = INVERSE ? -roots[2 * (j * k * turn) + 1] : roots[2 * (j * k * turn) + 1];
        }
        for (int64_t q = 0; q < side; ++q) {
            V re[N], im[N];
            const V* x = from + in * (q + side * j);
            for (int k = 0; k < N; ++k) re[k] = x[in * side * parts * k], im[k] = x[in * side * parts * k + 1];
            butterfly<V, N, INVERSE>(re, im);
            V* y = to + out * (q + side * N * j);
            y[0] = re[0], y[1] = im[0];
            if (j == 0)
                for (int k = 1; k < N; ++k) y[out * side * k] = re[k], y[out * side * k + 1] = im[k];
            else
                for (int k = 1; k < N; ++k) {
                    y[out * side * k] = re[k] * cosine[k] - im[k] * sine[k];
                    y[out * side * k + 1] = re[k] * sine[k] + im[k] * cosine[k];
                }
        }
    }
}

// For few passes: 64 = 8 · 8, 48 = 8 · 6, 36 = 6 · 6, 16 = 4 · 4.
inline int64_t first_factor(int64_t length) {
    if (length == 16) return 4;
    for (int64_t radix : {8, 6, 5, 4, 3})
        if (length % radix == 0) return radix;
    return 2;
}

// A product of 2, 3 and 5, at least two of them; vectors are `in` and `out` apart, and `from` may be `to` or `b`.
template <class T, bool INVERSE>
void transform(const typename Types<T>::V* from, int64_t in, typename Types<T>::V* to, int64_t out,
               typename Types<T>::V* a, typename Types<T>::V* b, const T* roots, int64_t size) {
    int64_t side = 1;
    for (int64_t length = size; length > 1;) {
        const int64_t radix = first_factor(length);
        const bool last = length == radix;
        auto* const target = last ? to : a;
        const int64_t step = last ? out : 2;
        if (radix == 8)
            pass<T, 8, INVERSE>(from, in, target, step, length, side, roots, size);
        else if (radix == 6)
            pass<T, 6, INVERSE>(from, in, target, step, length, side, roots, size);
        else if (radix == 5)
            pass<T, 5, INVERSE>(from, in, target, step, length, side, roots, size);
        else if (radix == 4)
            pass<T, 4, INVERSE>(from, in, target, step, length, side, roots, size);
        else if (radix == 3)
            pass<T, 3, INVERSE>(from, in, target, step, length, side, roots, size);
        else
            pass<T, 2, INVERSE>(from, in, target, step, length, side, roots, size);
        from = a, in = 2;
        std::swap(a, b);
        length /= radix, side *= radix;
    }
}

// ---- Tiles and planes ------------------------------------------------------------------------------------------------

struct Tile {
    int64_t image, top, left;

    Tile(const Sizes& s, int64_t index) {
        const int64_t each = s.down() * s.across();
        image = index / each;
        top = index % each / s.across() * s.tall;
        left = index % s.across() * s.wide;
    }
};

template <class T> struct Transforms {
    typedef typename Types<T>::V V;
    static constexpr int64_t W = Types<T>::W;
    const Sizes& s;
    const T *by_rows, *by_columns;  // roots of unity, exp(−2πi j / size)

    // Vectors that a thread needs beside a plane.
    int64_t scratch() const { return 4 * std::max(s.rows, s.columns); }

    // Two tiles of up to W channels, with what is around them if `around`, to all frequencies of a plane.
    void forward(const T* images, int64_t channels, int64_t block, bool around, int64_t index, V* plane, V* a) const {
        V* const b = a + 2 * std::max(s.rows, s.columns);
        const int64_t above = around ? s.above : 0, left = around ? s.left : 0, area = s.height * s.width;
        const int64_t some = std::min(W, channels - block * W);
        for (int64_t r = 0; r < s.rows; ++r) {
            V* const row = plane + r * s.step();
            const int64_t shift = r < s.tall + above ? r : r - s.rows;
            bool empty = true;
            for (int part = 0; part < 2; ++part) {
                if (2 * index + part >= s.tiles()) continue;
                const Tile tile(s, 2 * index + part);
                const int64_t at = tile.top + shift;
                if (shift < -above || at < 0 || at >= s.height) continue;
                if (empty) std::fill(a, a + 2 * s.columns, V{});
                empty = false;
                const int64_t from = std::max(int64_t(0), tile.left - left);
                const int64_t to = std::min(s.width, tile.left + s.wide + left);
                const int64_t start = from - tile.left + (from < tile.left ? s.columns : 0);
                const T* image = images + (tile.image * channels + block * W) * area + at * s.width + from;
                V* const target = a + part;
                const int64_t columns = s.columns;
                gather<T>(image, area, some, to - from, images + s.images * channels * area, [=](int64_t p, V x) {
                    target[2 * (start + p < columns ? start + p : start + p - columns)] = x;
                });
            }
            if (empty)
                std::fill(row, row + 2 * s.columns, V{});
            else
                transform<T, false>(a, 2, row, 2, b, a, by_columns, s.columns);
        }
        for (int64_t q = 0; q < s.columns; ++q)
            transform<T, false>(plane + 2 * q, s.step(), plane + 2 * q, s.step(), a, b, by_rows, s.rows);
    }

    // The way back, to the two tiles without what is around them; the plane is spoilt.
    void backward(V* plane, T* images, int64_t channels, int64_t block, int64_t index, V* a) const {
        V* const b = a + 2 * std::max(s.rows, s.columns);
        const int64_t area = s.height * s.width, some = std::min(W, channels - block * W);
        const T scale = T(1) / T(s.rows * s.columns);
        for (int64_t q = 0; q < s.columns; ++q)
            transform<T, true>(plane + 2 * q, s.step(), plane + 2 * q, s.step(), a, b, by_rows, s.rows);
        for (int64_t r = 0; r < s.tall; ++r) {
            bool found = false;
            for (int part = 0; part < 2; ++part) {
                if (2 * index + part >= s.tiles()) continue;
                const Tile tile(s, 2 * index + part);
                if (tile.top + r >= s.height) continue;
                V* const row = plane + r * s.step();
                if (!found) transform<T, true>(row, 2, row, 2, a, b, by_columns, s.columns);
                found = true;
                T* image = images + (tile.image * channels + block * W) * area + (tile.top + r) * s.width + tile.left;
                scatter<T>(row + part, scale, image, area, some, std::min(s.wide, s.width - tile.left));
            }
        }
    }
};

// Blocks of W channels.
template <class T> int64_t blocks(int64_t channels) { return (channels + Types<T>::W - 1) / Types<T>::W; }

// ---- Products --------------------------------------------------------------------------------------------------------

// At a frequency f and its negative, of P planes and N vectors of outputs: y(f) = x(f) S, y(−f) = x(−f) conj S. Inputs are
// the lanes of blocks that are `block` vectors apart, as are outputs; S is [c][o], real and imaginary parts apart.
template <class T, int P, int N>
void multiply(const typename Types<T>::V* const* x, const T* real, const T* imaginary, int64_t stride, int64_t inputs,
              typename Types<T>::V* const* y, int64_t block) {
    TYPES(T);
    V re[2 * P][N] = {}, im[2 * P][N] = {};
    for (int64_t first = 0; first < inputs; first += W) {
        const int64_t some = std::min(W, inputs - first);
        const T* from[2 * P];
        for (int m = 0; m < 2 * P; ++m) from[m] = reinterpret_cast<const T*>(x[m] + first / W * block);
        for (int64_t c = 0; c < some; ++c, real += stride, imaginary += stride) {
            V a[N], b[N];
            for (int n = 0; n < N; ++n) a[n] = load(real + n * W), b[n] = load(imaginary + n * W);
            for (int m = 0; m < 2 * P; ++m) {
                const T xr = from[m][c], xi = from[m][W + c];
                for (int n = 0; n < N; ++n) {
                    re[m][n] += xr * a[n];
                    im[m][n] += xi * a[n];
                    if (m % 2) {
                        re[m][n] += xi * b[n];
                        im[m][n] -= xr * b[n];
                    } else {
                        re[m][n] -= xi * b[n];
                        im[m][n] += xr * b[n];
                    }
                }
            }
        }
    }
    for (int m = 0; m < 2 * P; ++m)
        for (int n = 0; n < N; ++n) y[m][n * block] = re[m][n], y[m][n * block + 1] = im[m][n];
}

// Planes of a panel, at most: in `apply` two share what is read of the spectrum and lie in a core's cache, in `cross` the
// sums of four are added to the spectrum at once.
constexpr int64_t APPLIED = 2, CROSSED = 4;

// How planes lie in a panel, counted in blocks of W channels.
template <class T> struct Panel {
    int64_t in, out;  // blocks of inputs and of outputs
    int64_t place;    // where the outputs begin
    int64_t each;     // blocks of a plane
    int64_t count;    // planes

    static Panel applied(const Sizes& s, int threads) {
        const int64_t in = blocks<T>(s.inputs), out = blocks<T>(s.outputs);
        const int64_t place = out <= 2 ? 0 : in;  // up to two blocks are computed at once, and replace the inputs
        const int64_t count = std::max(int64_t(1), std::min(APPLIED, s.planes() / threads));
        return {in, out, place, std::max(in, place + out), count};
    }

    static Panel crossed(const Sizes& s) {
        const int64_t in = blocks<T>(s.inputs), out = blocks<T>(s.outputs);
        return {in, out, in, in + out, std::min(CROSSED, s.planes())};
    }
};

// Where the vectors of a frequency and its negative lie in each plane of a panel.
template <class V> void places(V* panel, int64_t count, int64_t each, int64_t here, int64_t there, V** found) {
    for (int64_t k = 0; k < count; ++k) found[2 * k] = panel + k * each + here, found[2 * k + 1] = panel + k * each + there;
}

// result[b, o] = Σ_c image[b, c] · S[c][o].
template <class T>
void apply(const T* images, const T* spectrum, T* results, const T* by_rows, const T* by_columns, T* scratch,
           const Sizes& s, int threads) {
    TYPES(T);
    const auto p = Panel<T>::applied(s, threads);
    const int64_t in = p.in, out = p.out, place = p.place, size = s.size(), each = p.each * size;
    const int64_t stride = out * W, matrix = s.inputs * stride;
    const Transforms<T> transforms{s, by_rows, by_columns};
    V* const first_own = aligned(scratch);
#pragma omp parallel num_threads(threads)
    {
        V* const own = first_own + thread() * (p.count * each + transforms.scratch());
        V* const panel = own + transforms.scratch();
        V *x[2 * APPLIED], *y[2 * APPLIED];
        // Each thread by itself: panels stay in the cache of its core, and nobody waits for others but at the end.
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < s.planes(); first += p.count) {
            const int64_t count = std::min(p.count, s.planes() - first);
            for (int64_t k = 0; k < count * in; ++k)
                transforms.forward(images, s.inputs, k % in, true, first + k / in,
                                   panel + k / in * each + k % in * size, own);
            for (int64_t q = 0; q < s.half(); ++q)
                for (int64_t r = 0; r < (s.edge(q) ? s.rows / 2 + 1 : s.rows); ++r) {
                    const T *real = spectrum + (q * s.rows + r) * 2 * matrix, *imaginary = real + matrix;
                    places(panel, count, each, s.at(r, q), s.minus(r, q), x);
                    for (int64_t o = 0; o < out; o += 2) {
                        for (int64_t k = 0; k < 2 * count; ++k) y[k] = x[k] + (place + o) * size;
                        for (int64_t k = 0; k < count; k += 2)
                            (out - o > 1 ? count - k > 1 ? multiply<T, 2, 2> : multiply<T, 1, 2>
                                         : count - k > 1 ? multiply<T, 2, 1> : multiply<T, 1, 1>)(
                                x + 2 * k, real + o * W, imaginary + o * W, stride, s.inputs, y + 2 * k, size);
                    }
                }
            for (int64_t k = 0; k < count * out; ++k)
                transforms.backward(panel + k / out * each + (place + k % out) * size, results, s.outputs, k % out,
                                    first + k / out, own);
        }
    }
}

constexpr int MANY = 8;

// Adds to the matrix [c][o] of a frequency f: conj x(f) y(f) + x(−f) conj y(−f), for C inputs, from one lane of x on, and
// a vector of outputs.
template <class T, int C>
void correlate(typename Types<T>::V* const* x, int64_t x_block, int64_t lane, typename Types<T>::V* const* y,
               int64_t y_block, int64_t planes, T scale, bool fresh, T* real, T* imaginary, int64_t stride) {
    TYPES(T);
    V re[C] = {}, im[C] = {};
    for (int64_t k = 0; k < 2 * planes; ++k) {
        const T* from = reinterpret_cast<const T*>(x[k] + x_block) + lane;
        const T sign = k % 2 ? T(-1) : T(1);
        const V a = y[k][y_block], b = y[k][y_block + 1] * sign;
        for (int c = 0; c < C; ++c) {
            const T xr = from[c], xi = from[W + c] * sign;
            re[c] += xr * a;
            re[c] += xi * b;
            im[c] += xr * b;
            im[c] -= xi * a;
        }
    }
    for (int c = 0; c < C; ++c) {
        T *const r = real + c * stride, *const i = imaginary + c * stride;
        store(fresh ? re[c] * scale : load(r) + re[c] * scale, r);
        store(fresh ? im[c] * scale : load(i) + im[c] * scale, i);
    }
}

// The derivative of Σ result · apply(image, S) by S.
template <class T>
void cross(const T* images, const T* results, T* spectrum, const T* by_rows, const T* by_columns, T* scratch,
           const Sizes& s, int threads) {
    TYPES(T);
    const auto p = Panel<T>::crossed(s);
    const int64_t in = p.in, out = p.out, size = s.size(), each = p.each * size;
    const int64_t stride = out * W, matrix = s.inputs * stride;
    const Transforms<T> transforms{s, by_rows, by_columns};
    V *const panel = aligned(scratch), *const rest = panel + p.count * each;
#pragma omp parallel num_threads(threads)
    {
        V* const own = rest + thread() * transforms.scratch();
        V *x[2 * CROSSED], *y[2 * CROSSED];
        for (int64_t first = 0; first < s.planes(); first += p.count) {
            const int64_t count = std::min(p.count, s.planes() - first);
#pragma omp for schedule(static)
            for (int64_t k = 0; k < count * (in + out); ++k) {
                const int64_t index = first + k / (in + out), block = k % (in + out);
                if (block < in)
                    transforms.forward(images, s.inputs, block, true, index, panel + k * size, own);
                else
                    transforms.forward(results, s.outputs, block - in, false, index, panel + k * size, own);
            }
#pragma omp for schedule(static)
            for (int64_t q = 0; q < s.half(); ++q) {
                // Every frequency stands for its negative as well, but at the edges, where that is there itself.
                const T scale = (s.edge(q) ? T(0.5) : T(1)) / T(s.rows * s.columns);
                for (int64_t r = 0; r < s.rows; ++r) {
                    T *real = spectrum + (q * s.rows + r) * 2 * matrix, *imaginary = real + matrix;
                    places(panel, count, each, s.at(r, q), s.minus(r, q), x);
                    places(panel + in * size, count, each, s.at(r, q), s.minus(r, q), y);
                    for (int64_t c = 0; c < s.inputs;) {
                        const bool many = std::min(W, s.inputs - c / W * W) - c % W >= MANY;
                        for (int64_t o = 0; o < out; ++o)
                            (many ? correlate<T, MANY> : correlate<T, 1>)(x, c / W * size, c % W, y, o * size, count, scale,
                                                                          first == 0, real + o * W, imaginary + o * W, stride);
                        const int64_t done = many ? MANY : 1;
                        c += done, real += done * stride, imaginary += done * stride;
                    }
                }
            }
        }
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                             \
    void apply_##NAME(const T* images, const T* spectrum, T* results, const T* by_rows, const T* by_columns,        \
                      T* scratch, const Sizes* sizes, int threads) {                                                \
        apply<T>(images, spectrum, results, by_rows, by_columns, scratch, *sizes, threads);                         \
    }                                                                                                               \
    void cross_##NAME(const T* images, const T* results, T* spectrum, const T* by_rows, const T* by_columns,        \
                      T* scratch, const Sizes* sizes, int threads) {                                                \
        cross<T>(images, results, spectrum, by_rows, by_columns, scratch, *sizes, threads);                         \
    }                                                                                                               \
    int64_t apply_scratch_##NAME(const Sizes* s, int threads) {                                                     \
        const auto p = Panel<T>::applied(*s, threads);                                                              \
        const Transforms<T> transforms{*s, nullptr, nullptr};                                                       \
        return (threads * (p.count * p.each * s->size() + transforms.scratch()) + 1) * Types<T>::W;                 \
    }                                                                                                               \
    int64_t cross_scratch_##NAME(const Sizes* s, int threads) {                                                     \
        const auto p = Panel<T>::crossed(*s);                                                                       \
        const Transforms<T> transforms{*s, nullptr, nullptr};                                                       \
        return (p.count * p.each * s->size() + threads * transforms.scratch() + 1) * Types<T>::W;                   \
    }

extern "C" {
EXPORT(float32, float)
EXPORT(float64, double)
int64_t vector_bytes() { return BYTES; }
}
