package store

import "context"

// Schema is the version of the database's schema, and the one that this program needs.
func (db *DB) Schema(ctx context.Context) (version, wanted int64, err error) {
	err = db.pool.QueryRow(ctx, "SELECT max(version_id) FROM goose_db_version WHERE is_applied").Scan(&version)
	if err != nil {
		return 0, schemaVersion, away("reading the schema's version", err)
	}
	return version, schemaVersion, nil
}
