// Correlation of images with 3×3 kernels by Winograd's method F(4×4, 3×3).
//
// An image (B, C, H, W) is cut into tiles that yield 4 × 4 pixels from 6 × 6. A tile is transformed to 36 numbers, each
// of which is a product of matrices with what has become of the kernels, (36, O, C), and is transformed back. The lanes
// of a vector are tiles, so that every lane is of use whatever the number of channels. A panel of a few vectors of tiles
// stays in the cache of a core from one end to the other.

#include "lanes.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int64_t CACHE = 640 * 1024;  // of a core, in bytes, less what the kernels and the images take
constexpr int64_t YIELD = 4, SIDE = 6, POINTS = SIDE * SIDE;

// What a call is about, in the order in which it comes from Python.
struct Shape {
    int64_t images, inputs, outputs, height, width;

    int64_t down() const { return (height + YIELD - 1) / YIELD; }
    int64_t across() const { return (width + YIELD - 1) / YIELD; }
    int64_t tiles() const { return images * down() * across(); }
};

// ---- Four neighbours in a row, and four vectors ----------------------------------------------------------------------

// Every second lane of the one vector and then of the other, from lane FIRST of them on.
template <class T, int FIRST, int... K>
typename Types<T>::V second(typename Types<T>::V x, typename Types<T>::V y, std::integer_sequence<int, K...>) {
#ifdef __clang__
    return __builtin_shufflevector(x, y, (FIRST + 2 * K)...);
#else
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> I;
    typedef I Index __attribute__((vector_size(BYTES)));
    return __builtin_shuffle(x, y, Index{(FIRST + 2 * K)...});
#endif
}

// Pixels of four vectors, one after the other, to the first, the second, the third and the fourth of each four.
template <class T> void apart(const typename Types<T>::V* from, typename Types<T>::V* to) {
    TYPES(T);
    constexpr std::make_integer_sequence<int, W> lanes;
    const V even = second<T, 0>(from[0], from[1], lanes), odd = second<T, 1>(from[0], from[1], lanes);
    const V later = second<T, 0>(from[2], from[3], lanes), odder = second<T, 1>(from[2], from[3], lanes);
    to[0] = second<T, 0>(even, later, lanes), to[2] = second<T, 1>(even, later, lanes);
    to[1] = second<T, 0>(odd, odder, lanes), to[3] = second<T, 1>(odd, odder, lanes);
}

// The way back.
template <class T> void together(const typename Types<T>::V* from, T* to) {
    TYPES(T);
    constexpr std::make_integer_sequence<int, W> lanes;
    const V a = merge<T, 0>(from[0], from[2], lanes), b = merge<T, W / 2>(from[0], from[2], lanes);
    const V c = merge<T, 0>(from[1], from[3], lanes), d = merge<T, W / 2>(from[1], from[3], lanes);
    store(merge<T, 0>(a, c, lanes), to), store(merge<T, W / 2>(a, c, lanes), to + W);
    store(merge<T, 0>(b, d, lanes), to + 2 * W), store(merge<T, W / 2>(b, d, lanes), to + 3 * W);
}

// ---- The transforms, along one side of a tile: points 0, ±1, ±2 and infinity -----------------------------------------

template <class V> void analyse(const V* x, int64_t step, V* y) {
    const V x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step], x5 = x[5 * step];
    const V even = x4 - 4 * x2, odd = x3 - 4 * x1, by_two = x4 - x2, odd_by_two = 2 * (x3 - x1);
    y[0] = 4 * x0 - 5 * x2 + x4;
    y[1] = even + odd, y[2] = even - odd;
    y[3] = by_two + odd_by_two, y[4] = by_two - odd_by_two;
    y[5] = 4 * x1 - 5 * x3 + x5;
}

template <class V> void synthesise(const V* x, int64_t step, V* y) {
    const V sum = x[step] + x[2 * step], difference = x[step] - x[2 * step];
    const V twice = x[3 * step] + x[4 * step], rest = x[3 * step] - x[4 * step];
    y[0] = x[0] + sum + twice;
    y[1] = difference + 2 * rest;
    y[2] = sum + 4 * twice;
    y[3] = difference + 8 * rest + x[5 * step];
}

// The second half of a tile's way: along its columns, to `points[point * apart_by]`.
template <class V> void analyse_columns(const V (*by_rows)[SIDE], V* points, int64_t apart_by) {
    for (int64_t q = 0; q < SIDE; ++q) {
        V column[SIDE];
        analyse(&by_rows[0][q], SIDE, column);
        for (int64_t r = 0; r < SIDE; ++r) points[(r * SIDE + q) * apart_by] = column[r];
    }
}

// ---- Panels of N vectors of tiles ------------------------------------------------------------------------------------

// Tiles of a panel that lie side by side.
struct Stretch {
    int64_t image, top, left;  // of what the first of them yields
    int64_t place, count;      // the first one's place in the panel, and how many they are
};

// The stretches of a panel from tile `first` on; how many there are.
int64_t stretches_of(const Shape& s, int64_t first, int64_t places, Stretch* found) {
    const int64_t end = std::min(first + places, s.tiles());
    int64_t number = 0;
    for (int64_t tile = first; tile < end; tile += found[number++].count) {
        const int64_t left = tile % s.across(), row = tile / s.across();
        const int64_t count = std::min(s.across() - left, end - tile);
        found[number] = {row / s.down(), row % s.down() * YIELD, left * YIELD, tile - first, count};
    }
    return number;
}

// `count` pixels of a row from column `from` on, zeros where there is no image; `row` is null where all of it is none.
// Up to a vector is written beyond them, and read, but not from `end` on.
template <class T> void copy_row(const T* row, int64_t width, int64_t from, int64_t count, const T* end, T* to) {
    constexpr int64_t W = Types<T>::W;
    const int64_t first = row ? std::max(int64_t(0), -from) : count;
    const int64_t last = row ? std::max(first, std::min(count, width - from)) : count;
    for (int64_t k = 0; k < first; ++k) to[k] = T(0);
    for (int64_t k = first; k < last; k += W)
        if (row + from + k + W <= end)
            store(load(row + from + k), to + k);
        else
            std::copy(row + from + k, row + from + last, to + k);
    for (int64_t k = last; k < count; ++k) to[k] = T(0);
}

// The tiles of a panel of one channel, to `points[point * apart_by + n]`.
template <class T, int N>
void read(const Shape& s, const T* images, int64_t channel, const Stretch* stretches, int64_t number,
          typename Types<T>::V* points, int64_t apart_by, T* scratch) {
    TYPES(T);
    constexpr int64_t PLACES = N * W, ROW = YIELD * PLACES;
    T *const rows = scratch, *const columns = rows + SIDE * ROW + W;  // columns[row][column of the tile][tile]
    const T* const end = images + s.images * s.inputs * s.height * s.width;
    T edges[SIDE][PLACES][2];
    // What is written in one loop is read in the next, when it has reached the cache.
    for (int64_t r = 0; r < SIDE; ++r)
        for (int64_t k = 0; k < number; ++k) {
            const Stretch& each = stretches[k];
            const int64_t at = each.top + r - 1, size = each.count * YIELD, right = each.left + size - 1;
            const bool inside = at >= 0 && at < s.height;
            const T* const row = inside ? images + ((each.image * s.inputs + channel) * s.height + at) * s.width : nullptr;
            copy_row(row, s.width, each.left - 1, size, end, rows + r * ROW + each.place * YIELD);
            for (int64_t j = 0; j < 2; ++j) edges[r][k][j] = inside && right + j < s.width ? row[right + j] : T(0);
        }
    for (int64_t r = 0; r < SIDE; ++r) {
        T* const own = columns + r * SIDE * PLACES;
        for (int n = 0; n < N; ++n) {
            V four[4], found[4];
            for (int k = 0; k < 4; ++k) four[k] = load(rows + r * ROW + (n * YIELD + k) * W);
            apart<T>(four, found);
            for (int k = 0; k < 4; ++k) store(found[k], own + k * PLACES + n * W);
        }
    }
    // The last two columns are the first of the next tile, but where a stretch ends.
    for (int64_t r = 0; r < SIDE; ++r) {
        T* const own = columns + r * SIDE * PLACES;
        for (int64_t j = 0; j < 2; ++j) {
            for (int n = 0; n < N; ++n) store(load(own + j * PLACES + n * W + 1), own + (4 + j) * PLACES + n * W);
            for (int64_t k = 0; k < number; ++k)
                own[(4 + j) * PLACES + stretches[k].place + stretches[k].count - 1] = edges[r][k][j];
        }
    }
    for (int n = 0; n < N; ++n) {
        V by_rows[SIDE][SIDE];
        for (int64_t r = 0; r < SIDE; ++r) {
            V found[SIDE];
            for (int64_t k = 0; k < SIDE; ++k) found[k] = load(columns + (r * SIDE + k) * PLACES + n * W);
            analyse(found, 1, by_rows[r]);
        }
        analyse_columns(by_rows, points + n, apart_by);
    }
}

// Whether every row of tiles fills vectors, and a panel rows of tiles.
template <class T, int N> bool fills(const Shape& s) {
    constexpr int64_t W = Types<T>::W;
    return s.across() * YIELD % W == 0 && N * W % s.across() == 0;
}

// The lanes from `first` to before `last`, and zeros.
template <class T, int... K>
typename Types<T>::V within(typename Types<T>::V x, int64_t first, int64_t last, std::integer_sequence<int, K...>) {
    typedef typename Types<T>::V V;
    typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> I;
    typedef I Index __attribute__((vector_size(BYTES)));
    constexpr Index lane = {K...};
    return reinterpret_cast<V>(reinterpret_cast<Index>(x) & (lane >= static_cast<I>(first)) & (lane < static_cast<I>(last)));
}

// Columns from `from` on of a row, zeros where there is no image; `row` is null where all of it is none.
template <class T> typename Types<T>::V row_vector(const T* row, int64_t width, int64_t from, const T* begin, const T* end) {
    TYPES(T);
    V found = {};
    if (!row) return found;
    const int64_t first = std::max(int64_t(0), -from), last = std::min(W, width - from);
    if (row + from >= begin && row + from + W <= end) {
        found = within<T>(load(row + from), first, last, std::make_integer_sequence<int, W>());
    } else {
        for (int64_t k = first; k < last; ++k) found[k] = row[from + k];
    }
    return found;
}

// The same as `read` where rows of tiles fill vectors: there are no seams, and nothing passes through the scratch.
template <class T, int N>
void read_filled(const Shape& s, const T* images, int64_t channel, const Stretch* stretches, int64_t number,
                 typename Types<T>::V* points, int64_t apart_by) {
    TYPES(T);
    const int64_t vectors = s.across() * YIELD / W;  // of a row
    const T* const end = images + s.images * s.inputs * s.height * s.width;
    for (int n = 0; n < N; ++n) {
        V by_rows[SIDE][SIDE];
        for (int64_t r = 0; r < SIDE; ++r) {
            V four[4], next[4], found[SIDE + 2];
            for (int64_t k = 0; k < 4; ++k) {
                const int64_t place = (n * YIELD + k) / vectors, column = (n * YIELD + k) % vectors * W;
                const Stretch& each = stretches[std::min(place, number - 1)];
                const int64_t at = each.top + r - 1;
                const bool inside = place < number && at >= 0 && at < s.height;
                const T* const row = inside ? images + ((each.image * s.inputs + channel) * s.height + at) * s.width : nullptr;
                four[k] = row_vector(row, s.width, column - 1, images, end);
                next[k] = row_vector(row, s.width, column + 3, images, end);
            }
            apart<T>(four, found), apart<T>(next, found + 4);
            analyse(found, 1, by_rows[r]);
        }
        analyse_columns(by_rows, points + n, apart_by);
    }
}

// The way back, to the pixels that the tiles yield.
template <class T, int N>
void write(const Shape& s, const typename Types<T>::V* points, int64_t apart_by, T* images, int64_t channel,
           const Stretch* stretches, int64_t number, T* rows) {
    TYPES(T);
    constexpr int64_t SPACE = YIELD * N * W;
    for (int n = 0; n < N; ++n) {
        V by_columns[YIELD][SIDE];
        for (int64_t q = 0; q < SIDE; ++q) {
            V column[YIELD];
            synthesise(points + q * apart_by + n, SIDE * apart_by, column);
            for (int64_t r = 0; r < YIELD; ++r) by_columns[r][q] = column[r];
        }
        for (int64_t r = 0; r < YIELD; ++r) {
            V found[YIELD];
            synthesise(by_columns[r], 1, found);
            together<T>(found, rows + r * SPACE + n * YIELD * W);
        }
    }
    for (int64_t k = 0; k < number; ++k) {
        const Stretch& each = stretches[k];
        T* const to = images + ((each.image * s.outputs + channel) * s.height + each.top) * s.width + each.left;
        const int64_t height = std::min(YIELD, s.height - each.top);
        const int64_t width = std::min(each.count * YIELD, s.width - each.left);
        for (int64_t r = 0; r < height; ++r)
            std::memcpy(to + r * s.width, rows + r * SPACE + each.place * YIELD, width * sizeof(T));
    }
}

// Of one point: M outputs, of which the kernels are `inputs` apart, and N vectors of tiles.
template <class T, int M, int N>
void multiply(const typename Types<T>::V* x, const T* kernels, int64_t inputs, typename Types<T>::V* y) {
    TYPES(T);
    V sum[M][N] = {};
    for (int64_t c = 0; c < inputs; ++c) {
        V from[N];
        for (int n = 0; n < N; ++n) from[n] = x[c * N + n];
        for (int m = 0; m < M; ++m) {
            const T by = kernels[m * inputs + c];
            for (int n = 0; n < N; ++n) sum[m][n] += by * from[n];
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) y[m * N + n] = sum[m][n];
}

// Vectors of tiles of a panel, which share what is read of the kernels: as many as leave a panel for every thread, and
// keep the points of all channels in a core's cache, if any number does.
template <class T> int64_t vectors(const Shape& s, int threads) {
    const int64_t held = POINTS * (s.inputs + s.outputs) * BYTES;  // by the points of one vector
    for (int64_t count : {4, 2})
        if (s.tiles() >= count * Types<T>::W * threads && (count * held <= CACHE || held > CACHE)) return count;
    return 1;
}

// What points are apart: off powers of two, which would share few places of the cache.
inline int64_t padded(int64_t count) { return count + 1; }

// Vectors for each one of a panel that are needed beside the points.
constexpr int64_t ROOM = SIDE * YIELD + SIDE * SIDE + 2;

// Numbers that a thread needs.
template <class T> int64_t scratch_of(const Shape& s, int threads) {
    const int64_t count = vectors<T>(s, threads);
    return (POINTS * (padded(s.inputs * count) + padded(s.outputs * count)) + ROOM * count + 1) * Types<T>::W;
}

template <class T, int N>
void correlate(const T* images, const T* kernels, T* results, T* scratch, const Shape& s, int threads) {
    TYPES(T);
    constexpr int64_t PLACES = N * W, MOST = 6;
    const int64_t panels = (s.tiles() + PLACES - 1) / PLACES, room = scratch_of<T>(s, threads);
    const bool filled = fills<T, N>(s);
    const int64_t blocks = (s.outputs + MOST - 1) / MOST;  // of outputs that are computed at once, of nearly one size
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t in_by = padded(s.inputs * N), out_by = padded(s.outputs * N);
        V* const in = aligned(scratch + thread() * room);
        V* const out = in + POINTS * in_by;
        T* const rows = reinterpret_cast<T*>(out + POINTS * out_by);
        Stretch stretches[PLACES];
        const int64_t number = stretches_of(s, panel * PLACES, PLACES, stretches);
        for (int64_t c = 0; c < s.inputs; ++c)
            if (filled)
                read_filled<T, N>(s, images, c, stretches, number, in + c * N, in_by);
            else
                read<T, N>(s, images, c, stretches, number, in + c * N, in_by, rows);
        for (int64_t point = 0; point < POINTS; ++point)
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t o = block * s.outputs / blocks, count = (block + 1) * s.outputs / blocks - o;
                const T* const by = kernels + (point * s.outputs + o) * s.inputs;
                const V* const x = in + point * in_by;
                V* const y = out + point * out_by + o * N;
                switch (count) {
                    case 6: multiply<T, 6, N>(x, by, s.inputs, y); break;
                    case 5: multiply<T, 5, N>(x, by, s.inputs, y); break;
                    case 4: multiply<T, 4, N>(x, by, s.inputs, y); break;
                    case 3: multiply<T, 3, N>(x, by, s.inputs, y); break;
                    case 2: multiply<T, 2, N>(x, by, s.inputs, y); break;
                    default: multiply<T, 1, N>(x, by, s.inputs, y);
                }
            }
        for (int64_t o = 0; o < s.outputs; ++o)
            write<T, N>(s, out + o * N, out_by, results, o, stretches, number, rows);
    }
}

template <class T>
void winograd(const T* images, const T* kernels, T* results, T* scratch, const Shape& s, int threads) {
    switch (vectors<T>(s, threads)) {
        case 4: return correlate<T, 4>(images, kernels, results, scratch, s, threads);
        case 2: return correlate<T, 2>(images, kernels, results, scratch, s, threads);
        default: return correlate<T, 1>(images, kernels, results, scratch, s, threads);
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
    void winograd_##NAME(const T* images, const T* kernels, T* results, T* scratch, const Shape* shape, int threads) { \
        winograd<T>(images, kernels, results, scratch, *shape, threads);                                              \
    }                                                                                                                \
    int64_t winograd_scratch_##NAME(const Shape* shape, int threads) { return threads * scratch_of<T>(*shape, threads); }

extern "C" {
EXPORT(float32, float)
EXPORT(float64, double)
}
