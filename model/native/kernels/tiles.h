// Int8 products with AMX tiles: 32 rows by 2 panels at a time. Integer sums are exact, so results equal those of the
// kernel for few rows. Included by products.h, inside its namespace.

constexpr int64_t TILES_FROM_ROWS = 9;  // below, the tiles would be mostly empty

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

INLINE void finish_tile(const Product& a, const int32_t* tile, int64_t row, int64_t panel) {
    for (int64_t m = 0; m < 16 && row + m < a.rows; m++)
        store(a.y + (row + m) * a.y_stride + panel * PANEL,
              Int8::finish(a, load<Vi>(tile + m * 16), row + m, panel * PANEL));
}

template <int P>
void tile_block(const Product& a, int64_t panel) {
    alignas(64) int32_t out[4][256];
    const int64_t tiles = a.k / 64;
    const uint8_t* w0 = a.panels + panel * a.k * PANEL;
    const uint8_t* w1 = a.panels + (panel + P - 1) * a.k * PANEL;
    for (int64_t row = 0; row < a.rows; row += 32) {
        const int8_t* x0 = a.xq.q + row * a.xq.stride;
        const int8_t* x1 = x0 + 16 * a.xq.stride;
        const bool is_tall = row + 16 < a.rows;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t t = 0; t < tiles; t++) {
            _tile_loadd(6, w0 + t * 1024, 64);
            if (P == 2) _tile_loadd(7, w1 + t * 1024, 64);
            _tile_loadd(4, x0 + t * 64, a.xq.stride);
            _tile_dpbsud(0, 4, 6);
            if (P == 2) _tile_dpbsud(1, 4, 7);
            if (is_tall) {
                _tile_loadd(5, x1 + t * 64, a.xq.stride);
                _tile_dpbsud(2, 5, 6);
                if (P == 2) _tile_dpbsud(3, 5, 7);
            }
        }
        _tile_stored(0, out[0], 64);
        _tile_stored(1, out[1], 64);
        _tile_stored(2, out[2], 64);
        _tile_stored(3, out[3], 64);
        finish_tile(a, out[0], row, panel);
        if (P == 2) finish_tile(a, out[1], row, panel + 1);
        if (is_tall) finish_tile(a, out[2], row + 16, panel);
        if (is_tall && P == 2) finish_tile(a, out[3], row + 16, panel + 1);
    }
}

void product_int8(const Product& a, int64_t panel, int64_t last) {
    if (a.rows < TILES_FROM_ROWS) return product<Int8>(a, panel, last);
    TileConfig config;
    for (int t = 0; t < 8; t++) {
        config.bytes[t] = 64;
        config.rows[t] = 16;
    }
    _tile_loadconfig(&config);
    for (; panel + 2 <= last; panel += 2) tile_block<2>(a, panel);
    if (panel < last) tile_block<1>(a, panel);
    _tile_release();  // live tiles add 8 KB to each context switch
}
