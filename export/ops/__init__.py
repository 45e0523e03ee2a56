"""Operations that every engine has."""
